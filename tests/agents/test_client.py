from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from agents.api import Cancel, Done, JobList, JobStarted, JobView, Move, Refused, Watch
from agents.client import report_of, where_it_runs
from agents.errors import Ambiguous, HostUnknown, MoveInDoubt, MoveRolledBack, NotFound, RequestRefused
from migrate.errors import InDoubt, MigrationFailed
from migrate.phases import Phase
from tests.agents.scripted_agent import (
    Script,
    ScriptedHosts,
    answering,
    guest_facts,
    guest_list,
    host_view,
    report,
    silent,
    view,
)
from transport.errors import PeerGone
from transport.wire import MessageChannel

pytestmark = pytest.mark.anyio

JOB = view().job
DONE = view(Phase.COMPLETE, has_ended=True)
VM1_ON_A = answering(guest_list("host-a", guest_facts()))
NOTHING_ON_B = answering(guest_list("host-b"))


async def test_all_hosts_are_asked_and_the_silent_ones_are_named() -> None:
    scripts: dict[str, list[Script]] = {
        "host-b": [answering(host_view("host-b"))],
        "host-a": [answering(host_view("host-a"))],
        "host-c": [],
        "host-d": [answering(Refused(code="internal-error", text="a bug"))],
    }
    async with ScriptedHosts(scripts) as hosts:
        answers, unreachable = await hosts.fleet().hosts()
    assert list(answers) == ["host-b", "host-a"]
    assert answers["host-a"] == host_view("host-a")
    assert unreachable == {
        "host-c": "the agent of host-c: cannot be reached",
        "host-d": "host-d refuses: a bug",
    }


async def test_a_silent_host_does_not_hold_up_the_others() -> None:
    async with ScriptedHosts(
        {"host-a": [silent], "host-b": [answering(guest_list("host-b", guest_facts()))]}, timeout_s=0.05
    ) as hosts:
        assert await hosts.fleet().find_guest("vm1") == "host-b"


async def test_a_host_that_is_not_configured_is_unknown() -> None:
    async with ScriptedHosts({"host-a": []}) as hosts:
        with pytest.raises(HostUnknown, match="names no host 'host-x', only host-a"):
            hosts.fleet().connect("host-x")


@pytest.mark.parametrize("wanted", ["vm1", "id-of-vm1"])
async def test_a_guest_is_found_by_name_and_by_identity(wanted: str) -> None:
    async with ScriptedHosts({"host-a": [VM1_ON_A], "host-b": [NOTHING_ON_B]}) as hosts:
        assert await hosts.fleet().find_guest(wanted) == "host-a"


async def test_an_identity_goes_before_a_name() -> None:
    impostor = guest_facts("id-of-vm1", "id-of-another")
    scripts = {"host-a": [VM1_ON_A], "host-b": [answering(guest_list("host-b", impostor))]}
    async with ScriptedHosts(scripts) as hosts:
        assert await hosts.fleet().find_guest("id-of-vm1") == "host-a"


async def test_an_absent_guest_is_an_error_that_says_who_did_not_answer() -> None:
    async with ScriptedHosts({"host-a": [], "host-b": [NOTHING_ON_B]}) as hosts:
        with pytest.raises(NotFound) as caught:
            await hosts.fleet().find_guest("vm1")
    assert str(caught.value) == (
        "no guest 'vm1' on host-b\nhost-a did not answer: the agent of host-a: cannot be reached"
    )


async def test_two_guests_of_one_name_are_both_named() -> None:
    other = guest_list("host-b", guest_facts("vm1", "another-id", is_running=False))
    async with ScriptedHosts({"host-a": [VM1_ON_A], "host-b": [answering(other)]}) as hosts:
        with pytest.raises(Ambiguous) as caught:
            await hosts.fleet().find_guest("vm1")
    assert caught.value.found == (
        "id-of-vm1 (vm1, running) on host-a",
        "another-id (vm1, paused) on host-b",
    )


async def test_a_job_is_found_at_its_source_by_its_first_letters() -> None:
    here, there = JobList(host="host-a", jobs=(view(),)), view(is_outgoing=False)
    scripts = {"host-b": [answering(JobList(host="host-b", jobs=(there,)))], "host-a": [answering(here)]}
    async with ScriptedHosts(scripts) as hosts:
        found = await hosts.fleet().find_job("a1")
    assert (found.host, found.job) == ("host-a", JOB)


async def test_a_job_of_a_dead_source_is_found_at_its_destination() -> None:
    there = JobList(host="host-b", jobs=(view(is_outgoing=False),))
    async with ScriptedHosts({"host-a": [], "host-b": [answering(there)]}) as hosts:
        assert (await hosts.fleet().find_job(JOB)).host == "host-b"


async def test_letters_that_two_jobs_begin_with_name_none_unless_they_are_all_of_one() -> None:
    jobs = JobList(host="host-a", jobs=(view(job="ab"), view(job="abc")))
    async with ScriptedHosts({"host-a": [answering(jobs)]}) as hosts:
        with pytest.raises(Ambiguous, match="more of its letters"):
            await hosts.fleet().find_job("a")
        assert (await hosts.fleet().find_job("ab")).job == "ab"
        with pytest.raises(NotFound):
            await hosts.fleet().find_job("")
        with pytest.raises(NotFound, match="no job 'b' on host-a"):
            await hosts.fleet().find_job("b")


async def test_a_move_gives_the_report_and_shows_every_view_on_the_way() -> None:
    received: list[object] = []
    seen: list[JobView] = []
    scripts = {
        "host-a": [
            VM1_ON_A,
            answering(JobStarted(job=JOB), received=received),
            answering((view(), DONE), received=received),
        ]
    }
    async with ScriptedHosts(scripts) as hosts:
        outcome = await hosts.fleet().move("vm1", "host-b", downtime_limit_s=0.1, on_progress=seen.append)
    assert outcome == report()
    assert seen == [view(), DONE]
    assert received == [
        Move(guest="id-of-vm1", to="host-b", downtime_limit_s=0.1),
        Watch(job=JOB),
    ]


async def test_a_move_is_followed_over_broken_connections() -> None:
    seen: list[JobView] = []
    watching = [answering(view()), answering((view(), view())), answering(), answering(DONE)]
    async with ScriptedHosts({"host-a": [VM1_ON_A, answering(JobStarted(job=JOB)), *watching]}) as hosts:
        assert await hosts.fleet().move("vm1", "host-b", on_progress=seen.append) == report()
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("phase", "error", "kind", "says"),
    [
        (
            Phase.ROLLED_BACK,
            MoveRolledBack,
            MigrationFailed,
            "vm1 was not moved: the link fell. It runs on host-a",
        ),
        (
            Phase.IN_DOUBT,
            MoveInDoubt,
            InDoubt,
            "On host-a it stays stopped; see `vmferry resolve a1b2c3d4e5f6`",
        ),
    ],
)
async def test_a_move_that_is_not_complete_raises_by_its_phase_with_the_report(
    phase: Phase, error: type[MoveRolledBack | MoveInDoubt], kind: type[Exception], says: str
) -> None:
    end = view(phase, has_ended=True, error="the link fell")
    scripts = {"host-a": [VM1_ON_A, answering(JobStarted(job=JOB)), answering(end)]}
    async with ScriptedHosts(scripts) as hosts:
        with pytest.raises(kind) as caught:
            await hosts.fleet().move("vm1", "host-b")
    assert isinstance(caught.value, error)
    assert caught.value.report == report(phase, "the link fell")
    assert says in str(caught.value)


async def test_a_watch_gives_up_after_the_outage_and_says_how_to_go_on() -> None:
    async with ScriptedHosts({"host-a": []}) as hosts:
        with pytest.raises(PeerGone, match=f"vmferry watch {JOB}` follows it when host-a answers"):
            await hosts.fleet(outage_s=0.0).follow("host-a", JOB)
    assert hosts.dials == ["host-a"]


async def test_a_move_whose_start_was_not_confirmed_says_that_it_may_have_begun() -> None:
    async with ScriptedHosts({"host-a": [answering()]}) as hosts:
        with pytest.raises(PeerGone, match="the move may have begun"):
            await hosts.fleet().start("host-a", Move(guest="vm1", to="host-b"))


async def test_a_refused_move_is_not_followed() -> None:
    refusal = answering(Refused(code="busy", text="vm1 is being moved already"))
    async with ScriptedHosts({"host-a": [VM1_ON_A, refusal]}) as hosts:
        with pytest.raises(RequestRefused, match="being moved already"):
            await hosts.fleet().move("vm1", "host-b")
    assert len(hosts.dials) == 2


class Cancellable:
    """A source whose job runs until it is cancelled, or, once COMMIT has left, to its end."""

    def __init__(self, *, is_too_late: bool = False) -> None:
        self.is_too_late = is_too_late
        self.was_asked = anyio.Event()
        self.watchers = 0

    async def __call__(self, channel: MessageChannel) -> None:
        while True:
            match await channel.receive():
                case Watch():
                    self.watchers += 1
                    await channel.send(view())
                    await self.was_asked.wait()
                    end = Phase.COMPLETE if self.is_too_late else Phase.ROLLED_BACK
                    await channel.send(view(end, has_ended=True))
                case Cancel(job=job):
                    assert job == JOB
                    await channel.send(
                        Refused(code="too-late", text="COMMIT has left") if self.is_too_late else Done()
                    )
                    self.was_asked.set()
                case Move():
                    await channel.send(JobStarted(job=JOB))
                case _:
                    await channel.send(guest_list("host-a", guest_facts()))


@pytest.mark.parametrize(
    ("is_too_late", "says"),
    [(False, "vm1 runs on host-a, nothing is left on host-b"), (True, "vm1 runs on host-b")],
)
async def test_a_cancelled_move_is_cancelled_at_the_agent_and_says_what_runs_where(
    is_too_late: bool, says: str
) -> None:
    said: list[str] = []
    async with ScriptedHosts({"host-a": [Cancellable(is_too_late=is_too_late)]}) as hosts:
        fleet = hosts.fleet()
        with anyio.CancelScope() as scope:
            await fleet.move("vm1", "host-b", on_progress=lambda _: scope.cancel(), on_cancelled=said.append)
        assert scope.cancelled_caught
    assert said == [says]


async def test_the_wait_after_a_cancellation_is_bounded() -> None:
    said: list[str] = []
    scripts = {"host-a": [VM1_ON_A, answering(JobStarted(job=JOB)), answering((view(),)), silent]}
    async with ScriptedHosts(scripts) as hosts:
        fleet = hosts.fleet(cancel_wait_s=0.05)
        with anyio.CancelScope() as scope:
            await fleet.move("vm1", "host-b", on_progress=lambda _: scope.cancel(), on_cancelled=said.append)
    assert said == [
        f"nobody knows how job {JOB} ended: host-a was asked to cancel it; see `vmferry watch {JOB}`"
    ]


@pytest.mark.parametrize("phase", Phase)
async def test_every_phase_says_what_runs_where(phase: Phase) -> None:
    said = where_it_runs(view(phase))
    assert ("resolve" in said) == (phase in (Phase.SWITCHOVER, Phase.IN_DOUBT))
    assert (said == "vm1 runs on host-b") == (phase is Phase.COMPLETE)


async def test_a_job_that_was_resolved_reports_its_last_phase() -> None:
    resolved = view(Phase.IN_DOUBT, has_ended=True, error="the last answer was lost")
    resolved = replace(resolved, phase=Phase.COMPLETE, because="host-b owns generation 2")
    assert report_of(resolved).phase is Phase.COMPLETE
    assert report_of(resolved).runs_on == "host-b"
    assert report_of(resolved).error == "host-b owns generation 2"


async def test_a_job_without_a_report_still_says_where_the_guest_runs() -> None:
    arrived = view(Phase.COMPLETE, has_ended=True, is_outgoing=False)
    assert arrived.report is None
    assert (report_of(arrived).runs_on, report_of(arrived).downtime) == ("host-b", None)
