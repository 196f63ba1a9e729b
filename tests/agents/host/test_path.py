"""The path that pages take, measured by real agents: what it carries, and what is said where it carries nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import pytest

from agents.api import Check, CheckReport
from agents.demo.proxy import Proxy
from migrate.preflight import AREAS, Finding, PreflightReport, Severity
from migrate.preflight.network import SWITCHOVER_ROUND_TRIPS
from tests.agents.host.conftest import AgentLog
from tests.agents.host.fleet import ALLOW_ALL, Fleet, running_fleet
from tests.agents.host.ways import FRONT, Delayed, HangsUp, OnlyGreetings, Slow, through
from transport import limits

pytestmark = pytest.mark.anyio


# The whole of a preflight beside the second of the measurement; a busy runner of two cores takes its time.
MOST_S = 6.0
MIB_S = 1 << 20


@asynccontextmanager
async def fronted(folder: Path, data: Proxy | None, lines: str = "") -> AsyncIterator[Fleet]:
    fronts = {"host-b": FRONT}
    async with running_fleet(folder, f'outage = "5s"\n{lines}', fronts=fronts) as fleet:
        fleet.start_guest("host-a")
        async with through(fleet, data):
            yield fleet


async def checked(fleet: Fleet, *, measures: bool = True) -> CheckReport:
    report = await fleet.ask("host-a", Check(guest="worker", to="host-b", measures=measures))
    assert isinstance(report, CheckReport), report
    return report


def finding(report: CheckReport, check: str) -> Finding:
    (found,) = (one for one in report.findings if one.check == check)
    return found


async def test_a_check_measures_what_pages_would_get(folder: Path, agent_log: AgentLog) -> None:
    async with running_fleet(folder) as fleet:
        fleet.start_guest("host-a")
        began_s = time.monotonic()
        report = await checked(fleet)
        took_s = time.monotonic() - began_s
    path = report.path
    assert path is not None
    assert path.data_port == fleet.data_ports["host-b"]
    assert path.goodput_bytes_per_s
    assert path.goodput_bytes_per_s > 10e6
    assert 0 < path.measured_bytes <= limits.MEASURE_BYTES
    assert path.measured_s <= limits.MEASURE_S + 0.5
    assert path.rtt_s
    assert path.ping_s
    assert path.rtt_s < path.ping_s < 0.5
    assert path.mtu_bytes
    assert path.mtu_bytes > 1500
    assert PreflightReport(findings=report.findings).is_passed
    assert {finding(report, one).severity for one in ("reachable", "mtu", "throughput")} == {Severity.OK}
    assert took_s < limits.MEASURE_S + MOST_S
    assert agent_log.count("failed inside") == 0
    # Its connections end between two records, which is in nobody's log.
    assert agent_log.count("data connection ended") == 0


@pytest.mark.slow
async def test_a_check_that_measures_nothing_still_reaches_the_data_port(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        fleet.start_guest("host-a")
        report = await checked(fleet, measures=False)
    assert report.path is not None
    assert report.path.goodput_bytes_per_s is None
    assert report.path.rtt_s
    assert finding(report, "reachable").severity is Severity.OK
    assert finding(report, "throughput").severity is Severity.UNKNOWN
    assert PreflightReport(findings=report.findings).is_passed


@pytest.mark.parametrize("rate", [10 * MIB_S, 1 * MIB_S])
@pytest.mark.slow
@pytest.mark.dealt
async def test_a_slow_link_is_measured_as_slow_as_it_is(folder: Path, rate: int) -> None:
    link = Slow(rate)
    async with fronted(folder, link) as fleet:
        report = await checked(fleet)
    assert report.path is not None
    measured = report.path.goodput_bytes_per_s
    assert measured
    achieved = link.achieved_bytes_per_s
    print(f"{measured / rate:.3f} of the rate was measured, {achieved / rate:.3f} of it passed")
    assert achieved / 1.5 < measured < rate * 1.5


@pytest.mark.slow
async def test_the_configured_bandwidth_holds_for_a_measurement_too(folder: Path) -> None:
    async with running_fleet(folder, 'bandwidth = "8MiB/s"') as fleet:
        fleet.start_guest("host-a")
        report = await checked(fleet)
    path = report.path
    assert path is not None
    assert path.cap_bytes_per_s == 8 * MIB_S
    assert path.goodput_bytes_per_s
    assert 4 * MIB_S < path.goodput_bytes_per_s <= 8 * MIB_S
    assert path.measured_bytes <= 8 * MIB_S * path.measured_s + limits.MAX_RECORD_BYTES
    assert "capped" in finding(report, "throughput").found


@pytest.mark.parametrize("measures", [True, False])
async def test_a_closed_data_port_is_a_finding_beside_all_others(folder: Path, measures: bool) -> None:
    async with fronted(folder, None) as fleet:
        report = await checked(fleet, measures=measures)
        port = str(fleet.data_ports["host-b"])
    refused = PreflightReport(findings=report.findings).of(Severity.REFUSED)
    assert [one.check for one in refused] == ["reachable"]
    assert port in refused[0].found
    assert "refused" in refused[0].found
    assert port in refused[0].remedy
    assert finding(report, "throughput").severity is Severity.UNKNOWN
    assert finding(report, "storage").severity is Severity.OK


@pytest.mark.parametrize("measures", [True, False])
@pytest.mark.slow
@pytest.mark.dealt
async def test_a_data_port_that_swallows_packets_is_found_in_time(folder: Path, measures: bool) -> None:
    """A full backlog drops what asks for a connection, as a firewall does."""
    async with fronted(folder, None) as fleet:
        with socket.socket() as wall, contextlib.ExitStack() as fillers:
            wall.bind((FRONT, fleet.data_ports["host-b"]))
            wall.listen(0)
            for _ in range(2):
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(wall.getsockname())
            began_s = time.monotonic()
            report = await checked(fleet, measures=measures)
            took_s = time.monotonic() - began_s
    (refused,) = PreflightReport(findings=report.findings).of(Severity.REFUSED)
    assert refused.check == "reachable"
    assert "dropped on the way" in refused.found
    assert took_s < 2 + MOST_S


async def test_a_control_port_that_cannot_be_reached_is_a_finding_and_hides_no_other(folder: Path) -> None:
    async with running_fleet(folder, fronts={"host-b": FRONT}) as fleet:
        fleet.start_guest("host-a")
        report = await checked(fleet)
        port = str(fleet.control_ports["host-b"])
    (refused,) = PreflightReport(findings=report.findings).of(Severity.REFUSED)
    assert refused.check == "reachable"
    assert f"{FRONT}:{port}" in refused.found
    assert "[peers.host-b]" in refused.remedy
    assert finding(report, "guest-blocked").severity is Severity.OK
    assert {one.check for one in report.findings} == {
        check.check_id for area in AREAS for check in area.CHECKS
    }
    assert report.path is None


@pytest.mark.slow
async def test_a_long_way_is_a_warning_that_tells_what_it_costs(folder: Path) -> None:
    fronts = {"host-b": FRONT}
    async with running_fleet(folder, 'outage = "5s"', fronts=fronts) as fleet:
        fleet.start_guest("host-a")
        async with through(fleet, Proxy("127.0.0.1"), control=Delayed(0.03)):
            report = await checked(fleet, measures=False)
    assert report.path is not None
    assert report.path.ping_s
    assert 0.06 <= report.path.ping_s < 0.5
    warned = finding(report, "round-trip")
    assert warned.severity is Severity.WARNING
    assert f"{SWITCHOVER_ROUND_TRIPS * report.path.ping_s * 1e3:.1f} ms of downtime" in warned.found


@pytest.mark.slow
async def test_somebody_else_behind_the_data_port_is_not_taken_for_the_destination(folder: Path) -> None:
    async with fronted(folder, HangsUp("127.0.0.1")) as fleet:
        for measures in (True, False):
            report = await checked(fleet, measures=measures)
            (refused,) = PreflightReport(findings=report.findings).of(Severity.REFUSED)
            assert refused.check == "reachable"


@pytest.mark.slow
async def test_a_path_on_which_nothing_but_greetings_passes_is_refused(folder: Path) -> None:
    async with fronted(folder, OnlyGreetings("127.0.0.1")) as fleet:
        report = await checked(fleet)
    (refused,) = PreflightReport(findings=report.findings).of(Severity.REFUSED)
    assert refused.check == "throughput"
    assert "nothing passed" in refused.found
    assert finding(report, "reachable").severity is Severity.OK


@pytest.mark.slow
async def test_two_checks_at_once_measure_one_after_the_other(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        fleet.start_guest("host-a")
        reports: list[CheckReport] = []

        async def check() -> None:
            reports.append(await checked(fleet))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(check)
            tasks.start_soon(check)
    assert [one.path is not None and bool(one.path.goodput_bytes_per_s) for one in reports] == [True, True]


@pytest.mark.slow
async def test_who_may_send_no_guests_may_not_measure(folder: Path) -> None:
    rules = ALLOW_ALL.replace('agents = ["*"]', 'agents = ["host-c"]')
    async with running_fleet(folder, rules=rules) as fleet:
        fleet.start_guest("host-a")
        answer = await fleet.ask("host-a", Check(guest="worker", to="host-b"))
    assert isinstance(answer, CheckReport)
    assert [one.check for one in answer.findings if one.severity is Severity.REFUSED] == ["allowed"]
    assert answer.path is None
