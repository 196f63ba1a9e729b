"""Networks that swallow everything without a word, and links that are down for long: the guest runs on meanwhile."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from anyio.to_thread import run_sync

from agents.api import SetLimits
from migrate.phases import Phase
from tests.agents.host.fleet import NOISE, SLOW, in_precopy, report_of
from tests.agents.host.network import FRONTS, Network, networks
from tests.agents.host.processes import Processes, running_processes
from tests.agents.host.test_killed import host_with
from tests.waiting import delay

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
]

SWALLOWED_S = 3.0
LIMITS = 'outage = "60s"\ndead_peer = "1s"'


@asynccontextmanager
async def two_hosts(
    folder: Path, loop: str, limits: str = LIMITS
) -> AsyncIterator[tuple[Processes, Network]]:
    """Two agents, and the network in front of host-b."""
    with running_processes(folder, loop, limits, fronts=FRONTS) as processes:
        fleet = processes.fleet
        ports: dict[str, tuple[int, ...]] = {
            "host-b": (fleet.control_ports["host-b"], fleet.data_ports["host-b"])
        }
        async with networks(ports) as made:
            yield processes, made["host-b"]


async def test_a_network_that_swallows_everything_is_noticed_and_the_precopy_goes_on(
    folder: Path, anyio_backend_name: str
) -> None:
    async with two_hosts(folder, anyio_backend_name) as (processes, network):
        fleet = processes.fleet
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        view = await fleet.until("host-a", job, in_precopy)
        network.stall()
        stalled_s = time.monotonic()
        await run_sync(processes.await_line, "host-a", "broke (nothing was acknowledged")
        # The bound for dead peers, and what a thread may be late.
        assert time.monotonic() - stalled_s < 3
        ticks = fleet.describe("host-a", guest).ticks
        await delay(SWALLOWED_S)
        during = fleet.describe("host-a", guest)
        assert during.is_running
        assert during.ticks > ticks
        network.mend()
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.error) == (Phase.COMPLETE, None)
        assert report.source_digest == report.destination_digest
        assert report.link_breaks >= 1
        assert report.resent_bytes <= report.link_breaks * ((4 << 20) + 2 * (1 << 20))
        assert view.phase is Phase.PRECOPY
        assert await host_with(fleet, guest) == "host-b"


async def test_a_network_that_swallows_the_last_pages_lets_the_guest_run_on(
    folder: Path, anyio_backend_name: str
) -> None:
    async with two_hosts(folder, anyio_backend_name) as (processes, network):
        fleet = processes.fleet
        # The last pages are on their way for longer than it takes to see that the guest has stopped.
        guest = fleet.start_guest("host-a", **NOISE | {"dirty_bytes_per_s": 3 << 20}).guest_id
        job = await fleet.start(
            "worker", "host-a", "host-b", bandwidth_bytes_per_s=2 * SLOW, downtime_limit_s=0.5
        )
        with anyio.fail_after(20):
            while fleet.describe("host-a", guest).is_running:
                await anyio.lowlevel.checkpoint()
        network.stall()
        stopped_s = time.monotonic()
        with anyio.fail_after(20):
            while not fleet.describe("host-a", guest).is_running:
                await anyio.lowlevel.checkpoint()
        # Four downtime limits, and the time it takes to look.
        assert 1 < time.monotonic() - stopped_s < 4
        await run_sync(processes.await_line, "host-a", "copied on")
        network.mend()
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.error) == (Phase.COMPLETE, None)
        assert report.source_digest == report.destination_digest
        assert await host_with(fleet, guest) == "host-b"


async def test_a_link_that_is_down_for_longer_than_is_borne_ends_the_move(
    folder: Path, anyio_backend_name: str
) -> None:
    async with two_hosts(folder, anyio_backend_name, 'outage = "2s"\ndead_peer = "1s"') as (
        processes,
        network,
    ):
        fleet = processes.fleet
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        network.stall()
        report = report_of(await fleet.follow("host-a", job))
        assert report.phase is Phase.ROLLED_BACK
        assert "for 2 s" in (report.error or "")
        gone = await fleet.follow("host-b", job)
        assert gone.phase is Phase.ROLLED_BACK
        assert await host_with(fleet, guest) == "host-a"
