"""The path that pages take, measured by real agents: what it carries, and what is said where it carries nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.abc
import pytest

from agents.api import Check, CheckReport
from agents.demo.proxy import Proxy
from migrate.preflight import AREAS, Finding, PreflightReport, Severity
from tests.agents.host.conftest import AgentLog
from tests.agents.host.fleet import ALLOW_ALL, Fleet, running_fleet
from tests.agents.host.network import FRONTS
from transport import limits

pytestmark = pytest.mark.anyio


F = TypeVar("F", bound=Callable[..., object])


def slow_once(test: F) -> F:
    """Mark a test as slow, and once is enough."""
    marked: F = pytest.mark.slow(pytest.mark.parametrize("anyio_backend", ["asyncio"])(test))
    return marked


# The whole of a preflight beside the second of the measurement; a busy runner of two cores takes its time.
MOST_S = 6.0
FRONT = FRONTS["host-b"]
MIB_S = 1 << 20


class Slow(Proxy):
    """A link of so many bytes a second, all connections together; `carried` is when how much of them had passed.

    A process that gets no CPU for a while makes up for at most LATE_S of it: what really passed is what counts.
    """

    LATE_S = 0.2

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__("127.0.0.1")
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self.carried: list[tuple[float, int]] = []

    @property
    def achieved_bytes_per_s(self) -> float:
        began_s, ended_s = self.carried[0][0], self.carried[-1][0]
        return sum(size for _, size in self.carried) / (ended_s - began_s)

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        free_at_s = max(self._free_at_s, anyio.current_time() - self.LATE_S)
        self._free_at_s = free_at_s + len(chunk) / self._bytes_per_s
        await anyio.sleep_until(self._free_at_s)
        await sink.send(chunk)
        self.carried.append((anyio.current_time(), len(chunk)))
        return True


class OnlyGreetings(Proxy):
    """A link on which nothing larger than a handshake arrives: as where large packets are dropped in silence."""

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        if len(chunk) <= 256:
            await sink.send(chunk)
        return True


@asynccontextmanager
async def through(fleet: Fleet, data: Proxy | None, control: Proxy | None = None) -> AsyncIterator[None]:
    """Let host-a find host-b at its front: the data port through `data` or not at all."""
    async with contextlib.AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        ways: list[tuple[Proxy, int]] = [(control or Proxy("127.0.0.1"), fleet.control_ports["host-b"])]
        if data is not None:
            ways.append((data, fleet.data_ports["host-b"]))
        for proxy, port in ways:
            listener = await stack.enter_async_context(
                await anyio.create_tcp_listener(local_host=FRONT, local_port=port)
            )

            async def serve(
                listener: anyio.abc.Listener[anyio.abc.SocketStream] = listener,
                proxy: Proxy = proxy,
                port: int = port,
            ) -> None:
                async def serve_one(near: anyio.abc.SocketStream) -> None:
                    await proxy.serve_connection(port, near)

                await listener.serve(serve_one)

            tasks.start_soon(serve)
        yield
        tasks.cancel_scope.cancel()


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


@slow_once
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
@slow_once
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


@slow_once
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
@slow_once
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


class Delayed(Proxy):
    """A long way: everything takes so long in either direction."""

    def __init__(self, delay_s: float) -> None:
        super().__init__("127.0.0.1")
        self._delay_s = delay_s

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        await anyio.sleep(self._delay_s)
        await sink.send(chunk)
        return True


@slow_once
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
    assert f"{3 * report.path.ping_s * 1e3:.1f} ms of downtime" in warned.found


class HangsUp(Proxy):
    """Somebody else at that port, who has nothing to say."""

    async def serve_connection(self, port: int, near: anyio.abc.SocketStream) -> None:
        await near.aclose()


@slow_once
async def test_somebody_else_behind_the_data_port_is_not_taken_for_the_destination(folder: Path) -> None:
    async with fronted(folder, HangsUp("127.0.0.1")) as fleet:
        for measures in (True, False):
            report = await checked(fleet, measures=measures)
            (refused,) = PreflightReport(findings=report.findings).of(Severity.REFUSED)
            assert refused.check == "reachable"


@slow_once
async def test_a_path_on_which_nothing_but_greetings_passes_is_refused(folder: Path) -> None:
    async with fronted(folder, OnlyGreetings("127.0.0.1")) as fleet:
        report = await checked(fleet)
    (refused,) = PreflightReport(findings=report.findings).of(Severity.REFUSED)
    assert refused.check == "throughput"
    assert "nothing passed" in refused.found
    assert finding(report, "reachable").severity is Severity.OK


@slow_once
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


@slow_once
async def test_who_may_send_no_guests_may_not_measure(folder: Path) -> None:
    rules = ALLOW_ALL.replace('agents = ["*"]', 'agents = ["host-c"]')
    async with running_fleet(folder, rules=rules) as fleet:
        fleet.start_guest("host-a")
        answer = await fleet.ask("host-a", Check(guest="worker", to="host-b"))
    assert isinstance(answer, CheckReport)
    assert [one.check for one in answer.findings if one.severity is Severity.REFUSED] == ["allowed"]
    assert answer.path is None
