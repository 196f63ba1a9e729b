"""The path that pages take, measured by real agents: what it carries, and what is said where it carries nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agents.api import Check, CheckReport
from migrate.preflight import Finding, PreflightReport, Severity
from tests.agents.host.fleet import Fleet, running_fleet
from transport import limits

pytestmark = pytest.mark.anyio

# The whole of a preflight beside the second of the measurement; a busy runner of two cores takes its time.
MOST_S = 6.0


async def checked(fleet: Fleet, *, measures: bool = True) -> CheckReport:
    report = await fleet.ask("host-a", Check(guest="worker", to="host-b", measures=measures))
    assert isinstance(report, CheckReport), report
    return report


def finding(report: CheckReport, check: str) -> Finding:
    (found,) = (one for one in report.findings if one.check == check)
    return found


async def test_a_check_measures_what_pages_would_get(folder: Path) -> None:
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
