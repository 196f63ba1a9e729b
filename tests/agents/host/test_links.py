"""Connections that break while a guest moves: the move goes on from what the destination has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from agents.api import JobView, SetLimits
from migrate.phases import Phase
from tests.agents.host.fleet import NOISE, SLOW, cut_connections, in_precopy, report_of, running_fleet

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

WINDOW_BYTES = 2 << 20
CUTS = 4


def has_sent(wire_bytes: int) -> Callable[[JobView], bool]:
    return lambda view: view.progress.wire_bytes > wire_bytes


async def test_data_connections_that_are_cut_cost_at_most_a_window_each(folder: Path) -> None:
    async with running_fleet(folder, 'connections = 2\nwindow = "2MiB"\noutage = "5s"') as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        view = await fleet.until("host-a", job, in_precopy)
        for _ in range(CUTS):
            seen = view.progress.wire_bytes
            assert cut_connections(fleet.data_ports["host-b"]) > 0
            view = await fleet.until("host-a", job, has_sent(seen + (1 << 18)))
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.error) == (Phase.COMPLETE, None)
        assert report.source_digest == report.destination_digest
        assert 1 <= report.link_breaks <= 2 * CUTS
        # Two connections may each have one record more than the window under way.
        assert report.resent_bytes <= CUTS * (WINDOW_BYTES + 2 * (1 << 20))
        await fleet.check_runs_only_at("host-b", guest)


async def test_control_connections_that_are_cut_end_nothing(folder: Path) -> None:
    async with running_fleet(folder, 'outage = "5s"') as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        for _ in range(2):
            with anyio.fail_after(5):  # it is dialled again for the next question
                while cut_connections(fleet.control_ports["host-b"]) == 0:
                    await anyio.lowlevel.checkpoint()
            assert (await fleet.until("host-a", job, in_precopy)).phase is Phase.PRECOPY
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.error) == (Phase.COMPLETE, None)
        await fleet.check_runs_only_at("host-b", guest)


async def test_cuts_all_the_way_through_the_switchover_leave_exactly_one_guest(folder: Path) -> None:
    async with running_fleet(folder, 'outage = "5s"') as fleet:
        guest = fleet.start_guest("host-a").guest_id
        is_over = anyio.Event()

        async def cut() -> None:
            while not is_over.is_set():
                for port in (fleet.control_ports["host-b"], fleet.data_ports["host-b"]):
                    cut_connections(port)
                with anyio.move_on_after(0.03):
                    await is_over.wait()

        job = await fleet.start("worker", "host-a", "host-b")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cut)
            report = report_of(await fleet.follow("host-a", job))
            is_over.set()
        assert report.runs_on in ("host-a", "host-b"), report.error
        await fleet.check_runs_only_at(report.runs_on, guest)
