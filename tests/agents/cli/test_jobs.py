from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from agents.api import (
    Cancel,
    Done,
    JobList,
    JobView,
    ListJobs,
    Pause,
    Refused,
    Resolution,
    Resolve,
    Resume,
    SetLimits,
    Watch,
)
from agents.cli.main import main
from agents.cli.output import Exit
from migrate.phases import Phase
from tests.agents.cli.conftest import Agents, Respond
from tests.agents.scripted_agent import view

JOB = view().job


def knows(*jobs: JobView, end: JobView | None = None, resolution: Resolution | None = None) -> Respond:
    """An agent that knows these jobs and obeys everything; a watch shows `end`."""

    def respond(request: object) -> Sequence[object]:
        match request:
            case ListJobs():
                return [JobList(host="host-a", jobs=jobs)]
            case Watch():
                return [end] if end is not None else []
            case Resolve():
                return [resolution or Refused(code="refused", text=f"job {JOB} is not in doubt")]
            case _:
                return [Done()]

    return respond


def resolution(*, is_resolved: bool) -> Resolution:
    return Resolution(
        job=JOB,
        guest_name="vm1",
        phase=Phase.COMPLETE if is_resolved else Phase.IN_DOUBT,
        record="generation 2 belongs to host-b",
        verdict="the guest belongs to host-b",
        runs_on="host-b" if is_resolved else None,
        is_resolved=is_resolved,
    )


def test_a_job_is_listed_once_though_both_ends_know_it(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts |= {"host-b": knows(view(is_outgoing=False)), "host-a": knows(view())}
    assert main(["jobs"]) == Exit.OK
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["JOB", "GUEST", "FROM", "TO"]
    assert [row.split()[:7] for row in rows] == [[JOB[:8], "vm1", "host-a", "host-b", "precopy", "1", "300"]]
    assert main(["jobs", "--json"]) == Exit.OK
    listed = json.loads(capsys.readouterr().out)["jobs"]
    assert [one["is_outgoing"] for one in listed] == [True]


def test_jobs_of_a_silent_host_are_missed_aloud(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts |= {"host-a": None, "host-b": knows(view())}
    assert main(["jobs"]) == Exit.UNREACHABLE
    shown = capsys.readouterr()
    assert JOB[:8] in shown.out
    assert shown.err == "error: host-a did not answer: the agent of host-a: cannot be reached\n"


@pytest.mark.parametrize(
    ("command", "request_made"),
    [
        (["pause", "a1"], Pause(job=JOB)),
        (["resume", "a1"], Resume(job=JOB)),
        (["set", "a1", "--bandwidth", "0"], SetLimits(job=JOB, bandwidth_bytes_per_s=0)),
        (["set", "a1", "--downtime-limit", "1s"], SetLimits(job=JOB, downtime_limit_s=1.0)),
    ],
)
def test_a_command_about_a_job_asks_its_source_by_its_whole_id(
    agents: Agents, command: list[str], request_made: object, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts |= {"host-b": knows(view(is_outgoing=False)), "host-a": knows(view())}
    assert main(command) == Exit.OK
    assert agents.asked[-1] == ("host-a", request_made)
    assert JOB[:8] in capsys.readouterr().out
    assert main([*command, "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == {"job": JOB}


def test_set_without_a_limit_is_a_usage_error(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", "a1"]) == Exit.USAGE
    assert "nothing to change" in capsys.readouterr().err


def test_an_unknown_job_is_refused(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = knows(view())
    assert main(["pause", "ff"]) == Exit.REFUSED
    assert capsys.readouterr().err == "error: no job 'ff' on host-a\n"


@pytest.mark.parametrize(
    ("phase", "code"),
    [(Phase.COMPLETE, Exit.OK), (Phase.ROLLED_BACK, Exit.REFUSED), (Phase.IN_DOUBT, Exit.IN_DOUBT)],
)
def test_a_watch_exits_as_the_move_would(agents: Agents, phase: Phase, code: Exit) -> None:
    agents.hosts["host-a"] = knows(view(), end=view(phase, has_ended=True, error="why"))
    assert main(["watch", JOB]) == code


def test_a_watch_at_the_destination_has_no_figures_and_still_says_where_the_guest_is(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    incoming = view(is_outgoing=False)
    end = replace(incoming, phase=Phase.COMPLETE, has_ended=True)
    agents.hosts |= {"host-a": None, "host-b": knows(incoming, end=end)}
    assert main(["watch", JOB]) == Exit.OK
    assert capsys.readouterr().out == "vm1 runs on host-b\n"


@pytest.mark.parametrize(
    ("phase", "code", "says"),
    [
        (Phase.ROLLED_BACK, Exit.OK, "vm1 runs on host-a, nothing is left on host-b"),
        (Phase.COMPLETE, Exit.REFUSED, "vm1 runs on host-b"),
        (Phase.IN_DOUBT, Exit.IN_DOUBT, "nobody knows yet"),
    ],
)
def test_cancel_waits_for_the_end_and_says_what_runs_where(
    agents: Agents, phase: Phase, code: Exit, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = knows(view(), end=view(phase, has_ended=True, error="why"))
    assert main(["cancel", JOB]) == code
    assert says in capsys.readouterr().out
    assert ("host-a", Cancel(job=JOB)) in agents.asked


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("is_resolved", [False, True])
def test_resolve_shows_what_is_known_and_exits_in_doubt_until_it_is_settled(
    agents: Agents, act: bool, is_resolved: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = knows(view(), resolution=resolution(is_resolved=is_resolved))
    command = ["resolve", JOB] + (["--act"] if act else [])
    assert main(command) == (Exit.OK if is_resolved else Exit.IN_DOUBT)
    assert agents.requests(Resolve) == [Resolve(job=JOB, act=act)]
    shown = capsys.readouterr().out
    assert "generation 2 belongs to host-b" in shown
    assert ("do not start the guest by hand" in shown.lower()) != is_resolved
    assert ("Nothing was changed" in shown) == (not act and not is_resolved)


def test_resolve_gives_json_with_the_agent_that_was_asked(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = knows(view(), resolution=resolution(is_resolved=True))
    assert main(["resolve", JOB, "--json"]) == Exit.OK
    printed = json.loads(capsys.readouterr().out)
    assert (printed["asked"], printed["resolution"]["runs_on"]) == ("host-a", "host-b")
