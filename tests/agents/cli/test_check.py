from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from agents.api import Check, CheckReport, GetHost, ListGuests, Refused
from agents.cli.checks import markdown
from agents.cli.main import main
from agents.cli.output import Exit
from migrate.preflight import AREAS, Finding, capacity, machine, storage
from tests.agents.cli.conftest import Agents, Respond
from tests.agents.scripted_agent import guest_facts, guest_list, host_view

OK = capacity.MEMORY.ok("host-b has room")
ODD = machine.CLOCK.warning("the clock of host-b is 2.0 s behind that of host-a")
BAD = storage.STORAGE.refused("disk0 is not proved")
PAGE = Path(__file__).parents[3] / "docs" / "preflight.md"


def source(answers: Mapping[str, Sequence[Finding] | Refused]) -> Respond:
    """host-a, which has vm1, and what it answers for each host."""

    def respond(request: object) -> Sequence[object]:
        match request:
            case ListGuests():
                return [guest_list("host-a", guest_facts())]
            case GetHost():
                return [host_view("host-a", peers=tuple(answers))]
            case Check(to=to):
                answer = answers[to]
                if isinstance(answer, Refused):
                    return [answer]
                return [CheckReport(guest="vm1", to=to, findings=tuple(answer))]
            case _:
                raise AssertionError(f"nobody asks {request}")

    return respond


@pytest.mark.parametrize(
    ("findings", "code"), [((OK,), Exit.OK), ((OK, ODD), Exit.OK), ((OK, BAD), Exit.REFUSED)]
)
def test_a_check_shows_every_finding_and_exits_by_the_worst(
    agents: Agents, findings: tuple[Finding, ...], code: Exit, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source({"host-b": findings})
    assert main(["check", "vm1", "--to", "host-b", "--all"]) == code
    shown = capsys.readouterr().out
    for finding in findings:
        assert finding.found in shown
        assert finding.remedy in shown
    assert ("(1 warning)" in shown) is (ODD in findings)
    assert main(["check", "vm1", "--to", "host-b", "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is (code == Exit.OK)
    assert [one["check"] for one in printed["findings"]] == [one.check for one in findings]
    assert all(one["asked"] and one["why"] for one in printed["findings"])


def test_the_worst_is_shown_first(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = source({"host-b": (OK, ODD, BAD)})
    main(["check", "vm1", "--to", "host-b", "--all"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["refused", "warning", "ok"]
    assert f"why storage: {BAD.why}" in lines


def test_what_is_as_it_should_be_is_named_in_a_line(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source({"host-b": (OK, ODD, OK)})
    main(["check", "vm1", "--to", "host-b"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["clock", "ok:", "vm1"]
    assert lines[2].startswith("ok: memory (")


def test_any_host_is_asked_and_one_that_fits_is_enough(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source(
        {
            "host-b": (OK, BAD),
            "host-c": (OK, ODD),
            "host-d": Refused(code="unreachable", text="host-d does not answer"),
        }
    )
    assert main(["check", "vm1", "--to", "any"]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["host-b", "refused"],
        ["host-c", "fits"],
        ["host-d", "unreachable"],
    ]
    assert "disk0 is not proved" in lines[1]
    assert "host-d does not answer" in lines[3]
    assert lines[-1] == "vm1 on host-a can move to host-c"
    assert main(["check", "vm1", "--to", "any", "--json"]) == Exit.OK
    printed = json.loads(capsys.readouterr().out)
    assert [(one["destination"], one["passed"]) for one in printed["hosts"]] == [
        ("host-b", False),
        ("host-c", True),
        ("host-d", False),
    ]
    assert "host-d does not answer" in printed["hosts"][2]["error"]


def test_no_host_that_fits_is_a_refusal(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = source({"host-b": (BAD,)})
    assert main(["check", "vm1", "--to", "any"]) == Exit.REFUSED
    assert capsys.readouterr().out.splitlines()[-1] == "vm1 on host-a can move to no host"


def test_every_check_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checks", "--json"]) == Exit.OK
    listed = json.loads(capsys.readouterr().out)
    ids = [one["check_id"] for one in listed]
    assert len(set(ids)) == len(ids) == sum(len(area.CHECKS) for area in AREAS)
    assert all(one["asked"].endswith("?") and one["why"] and one["remedy"] for one in listed)
    assert not any(one[key].endswith(".") for one in listed for key in ("why", "remedy"))
    assert main(["checks", "cpu-features"]) == Exit.OK
    assert "every CPU feature" in capsys.readouterr().out
    assert main(["checks", "nonsense"]) == Exit.USAGE


def test_the_page_of_the_documentation_is_the_catalogue() -> None:
    assert PAGE.read_text() == markdown()
