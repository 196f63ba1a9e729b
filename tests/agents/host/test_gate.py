"""Two agents and their [[allow]]: what is denied is not done, and both stand in the audit log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.api import (
    Cancel,
    Check,
    CheckReport,
    GetHost,
    ListGuests,
    ListJobs,
    Move,
    Refused,
    Resolve,
    Watch,
)
from agents.audit import REFUSALS_PER_MINUTE
from migrate.phases import Phase
from migrate.preflight import Severity
from tests.agents.host.fleet import Fleet, report_of, running_fleet
from transport.limits import MAX_SESSIONS_PER_OWNER

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

OPERATORS = '[[allow]]\noperators = ["tester"]\nmay = ["move"]\n'
SMALL_AGENTS = '[[allow]]\nagents = ["host-a"]\nmay = ["send-guests"]\nguests = ["small-*"]\n'


def audited(fleet: Fleet, host: str) -> list[dict[str, object]]:
    path = fleet.state_dir(host) / "audit.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_without_rules_every_request_is_denied_and_written_down(folder: Path) -> None:
    requests = (
        GetHost(),
        ListGuests(),
        ListJobs(),
        Check(guest="worker", to="host-b"),
        Move(guest="worker", to="host-b"),
        Watch(job="0" * 32),
        Cancel(job="0" * 32),
        Resolve(job="0" * 32, act=True),
    )
    async with running_fleet(folder, rules="") as fleet:
        guest = fleet.start_guest("host-a").guest_id
        for request in requests:
            answer = await fleet.ask("host-a", request)
            assert isinstance(answer, Refused)
            assert "[[allow]]" in answer.text
        await fleet.check_runs_only_at("host-a", guest)
    lines = audited(fleet, "host-a")
    assert [line["verdict"] for line in lines] == ["denied"] * len(requests)
    assert {line["peer"] for line in lines} == {"operator/tester"}


async def test_a_host_that_may_not_bring_a_guest_is_refused_and_the_guest_stays(folder: Path) -> None:
    async with running_fleet(folder, rules=OPERATORS + SMALL_AGENTS) as fleet:
        guest = fleet.start_guest("host-a").guest_id
        view = await fleet.move("worker", "host-a", "host-b")
        assert view.phase == Phase.ROLLED_BACK
        assert "agent/host-a may not send worker to host-b" in str(report_of(view).error)
        await fleet.check_runs_only_at("host-a", guest)
    line = audited(fleet, "host-b")[0]
    assert (line["verdict"], line["peer"], line["guest"]) == ("denied", "agent/host-a", "worker")


async def test_what_is_allowed_is_done_and_written_down_at_both_ends(folder: Path) -> None:
    async with running_fleet(folder, rules=OPERATORS + SMALL_AGENTS) as fleet:
        fleet.start_guest("host-a", name="small-1")
        view = await fleet.move("small-1", "host-a", "host-b")
        assert view.phase == Phase.COMPLETE
    moved, sent = audited(fleet, "host-a"), audited(fleet, "host-b")
    assert [(line["verdict"], line["action"], line["rule"]) for line in moved] == [
        ("allowed", "move", "allow[0]")
    ]
    assert [(line["verdict"], line["action"], line["rule"]) for line in sent] == [
        ("allowed", "send-guests", "allow[1]")
    ]


async def test_who_is_denied_again_and_again_shuts_nobody_out(folder: Path) -> None:
    async with running_fleet(folder, rules=OPERATORS + SMALL_AGENTS) as fleet:
        fleet.start_guest("host-a", name="small-1")
        fleet.start_guest("host-a", name="large-1")
        async with fleet.operator("host-a") as channel:
            for _ in range(MAX_SESSIONS_PER_OWNER + 1):
                await channel.send(Check(guest="large-1", to="host-b"))
                answer = await channel.receive()
                assert isinstance(answer, CheckReport)
                denied = [f for f in answer.findings if f.check == "allowed"]
                assert [f.severity for f in denied] == [Severity.OK, Severity.REFUSED]
                assert "agent/host-a may not send large-1" in denied[1].found
                # What needs a word of the destination is unknown, the rest is judged.
                assert {f.check for f in answer.findings if f.severity is not Severity.UNKNOWN} == {
                    "guest-blocked",
                    "outgoing-limit",
                    "in-doubt",
                    "draining",
                    "allowed",
                    "certificates",
                    "confidential",
                }
            await channel.send(Check(guest="small-1", to="host-b"))
            assert isinstance(await channel.receive(), CheckReport)
    lines = audited(fleet, "host-b")
    assert len(lines) == REFUSALS_PER_MINUTE
