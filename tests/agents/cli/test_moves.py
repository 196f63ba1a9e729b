from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence

import anyio
import pytest

from agents.api import (
    Cancel,
    Done,
    JobStarted,
    JobView,
    ListGuests,
    Move,
    Refused,
    Watch,
)
from agents.cli.main import main
from agents.cli.moves import Ending, conclude, follow_job
from agents.cli.output import Exit
from agents.cli.progress import SilentDisplay
from agents.client import Fleet
from migrate.compression import Compression
from migrate.phases import Phase
from migrate.plan import OnTimeout
from tests.agents.cli.conftest import Agents, Respond
from tests.agents.scripted_agent import ROUNDS, ScriptedHosts, guest_facts, guest_list, view
from transport.wire import MessageChannel

JOB = view().job


def source(*views: JobView, move: object = None) -> Respond:
    """host-a, which has vm1: a move of it shows `views`."""

    def respond(request: object) -> Sequence[object]:
        match request:
            case ListGuests():
                return [guest_list("host-a", guest_facts())]
            case Move():
                return [move or JobStarted(job=JOB)]
            case Watch():
                return views
            case _:
                return [Refused(code="refused", text="the migration is in phase switchover")]

    return respond


def ended(phase: Phase, error: str | None = None) -> JobView:
    return view(phase, has_ended=True, rounds=ROUNDS, error=error)


def test_a_complete_move_shows_its_rounds_and_its_summary(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source(view(Phase.SETUP, rounds=()), view(), ended(Phase.COMPLETE))
    assert main(["move", "vm1", "--to", "host-b"]) == Exit.OK
    shown = capsys.readouterr()
    assert "vm1 was moved from host-a to host-b, and runs there" in shown.out
    assert "proof " in shown.out
    lines = shown.err.splitlines()
    assert lines[0].startswith("setup")
    assert [line.split(":")[0] for line in lines if line.startswith("round")] == ["round 0", "round 1"]
    assert lines[-1].startswith("complete")


def test_json_prints_one_object_and_nothing_else(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = source(view(), ended(Phase.COMPLETE))
    assert main(["move", "vm1", "--to", "host-b", "--json"]) == Exit.OK
    shown = capsys.readouterr()
    printed = json.loads(shown.out)
    assert (printed["job"], printed["phase"], printed["ram_equal"]) == (JOB, "complete", True)
    assert shown.err == ""


def test_the_options_of_a_move_arrive_in_its_request(agents: Agents) -> None:
    agents.hosts["host-a"] = source(ended(Phase.COMPLETE))
    options = "--offline --downtime-limit 50ms --bandwidth 1Gbit/s --timeout 5m --on-timeout suspend"
    more = "--compression off --no-audit"
    assert main(["move", "vm1", "--to", "host-b", *options.split(), *more.split()]) == Exit.OK
    assert agents.requests(Move) == [
        Move(
            guest="id-of-vm1",
            to="host-b",
            is_offline=True,
            downtime_limit_s=0.05,
            bandwidth_bytes_per_s=125_000_000,
            timeout_s=300.0,
            on_timeout=OnTimeout.SUSPEND,
            compression=Compression.OFF,
            audit=False,
        )
    ]


def test_what_is_not_given_is_left_to_the_agent(agents: Agents) -> None:
    agents.hosts["host-a"] = source(ended(Phase.COMPLETE))
    main(["move", "vm1", "--to", "host-b"])
    assert agents.requests(Move) == [Move(guest="id-of-vm1", to="host-b")]


@pytest.mark.parametrize("wrong", [["--bandwidth", "fast"], ["--timeout", "5"], ["--on-timeout", "hope"], []])
def test_a_wrong_option_is_a_usage_error(
    agents: Agents, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["move", "vm1", *wrong] + (["--to", "host-b"] if wrong else [])
    assert main(command) == Exit.USAGE
    assert "vmferry move --help" in capsys.readouterr().err
    assert agents.asked == []


@pytest.mark.parametrize(
    ("phase", "code", "says"),
    [
        (Phase.ROLLED_BACK, Exit.REFUSED, "error: vm1 was not moved: the link fell. It runs on host-a"),
        (Phase.IN_DOUBT, Exit.IN_DOUBT, f"see `vmferry resolve {JOB}`"),
    ],
)
def test_a_move_that_fails_says_what_runs_where_and_exits_so(
    agents: Agents, phase: Phase, code: Exit, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source(view(), ended(phase, "the link fell"))
    assert main(["move", "vm1", "--to", "host-b"]) == code
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("code", "exit_code"), [("busy", Exit.REFUSED), ("unreachable", Exit.UNREACHABLE)])
def test_a_refused_move_exits_by_the_refusals_code(
    agents: Agents, code: str, exit_code: Exit, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source(move=Refused(code=code, text="no"))
    assert main(["move", "vm1", "--to", "host-b"]) == exit_code
    assert capsys.readouterr().err == "error: host-a refuses: no\n"


def test_a_guest_that_may_be_on_a_silent_host_exits_as_unreachable(agents: Agents) -> None:
    agents.hosts |= {"host-a": source(), "host-b": None}
    assert main(["move", "vm2", "--to", "host-b"]) == Exit.UNREACHABLE


def test_an_agent_that_dies_under_a_move_is_told_with_the_way_to_go_on(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source(view())
    assert main(["move", "vm1", "--to", "host-b"]) == Exit.UNREACHABLE
    assert f"`vmferry watch {JOB}`" in capsys.readouterr().err


def test_a_detached_move_prints_its_job_alone(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = source()
    assert main(["move", "vm1", "--to", "host-b", "--detach"]) == Exit.OK
    assert capsys.readouterr().out == f"{JOB}\n"
    assert agents.requests(Watch) == []


def test_ctrl_c_cancels_the_job_and_says_what_runs_where(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    is_cancelled = False

    def respond(request: object) -> Sequence[object]:
        nonlocal is_cancelled
        match request:
            case Cancel():
                is_cancelled = True
                return [Done()]
            case Watch() if not is_cancelled:
                if not agents.requests(Watch)[1:]:
                    os.kill(os.getpid(), signal.SIGINT)
                return [view()]
            case Watch():
                return [ended(Phase.ROLLED_BACK, "cancelled by request")]
            case _:
                return source()(request)

    agents.hosts["host-a"] = respond
    agents.outage_s = 5.0
    assert main(["move", "vm1", "--to", "host-b"]) == Exit.INTERRUPTED
    shown = capsys.readouterr()
    assert f"cancelling job {JOB}" in shown.err
    assert "vm1 was not moved: cancelled by request. It runs on host-a" in shown.err


class PressedSource:
    """A source whose job ends when it is asked to cancel: rolled back, or complete when COMMIT had left."""

    def __init__(self, *, is_too_late: bool = False, never_ends: bool = False) -> None:
        self.is_too_late = is_too_late
        self.never_ends = never_ends
        self.was_asked = anyio.Event()

    async def __call__(self, channel: MessageChannel) -> None:
        while True:
            match await channel.receive():
                case Cancel():
                    await channel.send(
                        Refused(code="too-late", text="COMMIT may have left") if self.is_too_late else Done()
                    )
                    self.was_asked.set()
                case _:
                    await channel.send(view())
                    await self.was_asked.wait()
                    if not self.never_ends:
                        await channel.send(ended(Phase.COMPLETE if self.is_too_late else Phase.ROLLED_BACK))


class Heard(SilentDisplay):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


async def press(fleet: Fleet, times: int) -> tuple[Ending, list[str]]:
    """Follow the job and press Ctrl-C `times` times."""
    send, presses = anyio.create_memory_object_stream[int](times)
    display = Heard()
    with send, presses:
        for count in range(times):
            send.send_nowait(count)
        with anyio.fail_after(5):
            return await follow_job(fleet, "host-a", JOB, display, presses), display.said


@pytest.mark.anyio
async def test_the_first_ctrl_c_cancels_and_waits() -> None:
    async with ScriptedHosts({"host-a": [PressedSource()]}) as hosts:
        ending, said = await press(hosts.fleet(), 1)
    assert ending.view == ended(Phase.ROLLED_BACK)
    assert ending.was_cancelled
    assert said == [f"cancelling job {JOB}; Ctrl-C again leaves it to the agent"]
    assert conclude(ending, as_json=False) == Exit.INTERRUPTED


@pytest.mark.anyio
async def test_a_ctrl_c_that_is_too_late_follows_the_guest_to_its_new_host() -> None:
    async with ScriptedHosts({"host-a": [PressedSource(is_too_late=True)]}) as hosts:
        ending, said = await press(hosts.fleet(), 1)
    assert said[1] == "too late to cancel: COMMIT may have left. Following the guest to where it goes"
    assert not ending.was_cancelled
    assert conclude(ending, as_json=True) == Exit.OK


@pytest.mark.anyio
async def test_the_second_ctrl_c_leaves_the_job_and_says_how_to_follow_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with ScriptedHosts({"host-a": [PressedSource(never_ends=True)]}) as hosts:
        ending, _ = await press(hosts.fleet(), 2)
    assert ending.view is None
    assert conclude(ending, as_json=False) == Exit.INTERRUPTED
    assert f"`vmferry watch {JOB}` follows it" in capsys.readouterr().err


def test_a_job_that_rolled_back_by_itself_is_no_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    ending = Ending(job=JOB, view=ended(Phase.ROLLED_BACK), was_cancelled=False)
    assert conclude(ending, as_json=False) == Exit.REFUSED
