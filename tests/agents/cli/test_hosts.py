from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from agents.api import GetHost
from agents.cli.main import main
from agents.cli.output import Exit
from tests.agents.cli.conftest import Agents, Respond
from tests.agents.scripted_agent import guest_facts, guest_list, host_view


def agent_of(host: str) -> Respond:
    def respond(request: object) -> Sequence[object]:
        return [host_view(host) if isinstance(request, GetHost) else guest_list(host, guest_facts())]

    return respond


def test_hosts_are_listed_with_their_free_memory_and_moves(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = agent_of("host-a")
    assert main(["hosts"]) == Exit.OK
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:5] == ["HOST", "STATE", "GUESTS", "FREE", "OUT"]
    assert row.split() == ["host-a", "up", "1", "8.00", "GiB", "0/4", "1/4", "embedded", "host-b", "0.1.0"]


def test_guests_are_listed_with_their_host_and_identity(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = agent_of("host-a")
    assert main(["guests"]) == Exit.OK
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == [
        *("vm1", "host-a", "running", "64.0", "MiB", "qemu64", "0", "embedded", "id-of-vm1"),
    ]


@pytest.mark.parametrize("command", ["hosts", "guests"])
def test_a_silent_host_is_named_and_changes_the_exit_code(
    agents: Agents, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts |= {"host-a": agent_of("host-a"), "host-b": None}
    assert main([command]) == Exit.UNREACHABLE
    assert "error: host-b did not answer" in capsys.readouterr().err
    assert main([command, "--json"]) == Exit.UNREACHABLE
    shown = capsys.readouterr()
    printed = json.loads(shown.out)
    assert len(printed[command]) == 1
    assert list(printed["unreachable"]) == ["host-b"]
    assert shown.err == ""


def test_nothing_found_says_so(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = lambda request: [guest_list("host-a")]
    assert main(["guests"]) == Exit.OK
    assert capsys.readouterr().err == "no guests\n"
