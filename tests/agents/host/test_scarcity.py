"""Hosts that run out of something on the way: rolled back, said in words, nothing lost."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from agents.api import SetLimits
from agents.hypervisors.embedded.client import GuestClient
from agents.hypervisors.embedded.rundir import GuestPaths
from memory.errors import OutOfRam
from migrate.pagewire import PageConsumer
from migrate.phases import Phase
from tests.agents.host.conftest import AgentLog
from tests.agents.host.fleet import NOISE, SLOW, Fleet, in_precopy, report_of, running_fleet

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@contextlib.contextmanager
def tiny_disk(folder: Path) -> Iterator[None]:
    """Mount a file system of a few pages on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs root, and a container that lets it mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


async def test_a_destination_without_the_memory_is_refused_before_the_first_page(folder: Path) -> None:
    async with running_fleet(folder, embedded='memory_limit = "96MiB"') as fleet:
        guest = fleet.start_guest("host-a", ram_bytes=64 << 20).guest_id
        fleet.start_guest("host-b", name="other")
        report = report_of(await fleet.move("worker", "host-a", "host-b"))
        assert report.phase is Phase.ROLLED_BACK
        assert "host-b has 32 MiB free, and worker needs 128 MiB" in (report.error or "")
        assert report.counts.pages == 0
        await fleet.check_runs_only_at("host-a", guest)


async def test_a_destination_machine_that_dies_on_the_way_is_rolled_back_and_said(folder: Path) -> None:
    async with running_fleet(folder, 'outage = "1s"\ndead_peer = "1s"') as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)

        def kill_machine() -> None:
            client = GuestClient(GuestPaths.of_guest(fleet.guests_dir("host-b"), guest).socket)
            with contextlib.closing(client):
                client.quit()
                client.await_end()

        await run_sync(kill_machine)
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        with anyio.fail_after(20):
            report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
        assert report.error
        await fleet.check_runs_only_at("host-a", guest)
        assert fleet.machines("host-b") == []


async def test_a_full_journal_disk_at_the_source_ends_the_move_before_it_begins(folder: Path) -> None:
    fleet = Fleet(folder)
    with tiny_disk(fleet.state_dir("host-a")):
        async with running_fleet(folder) as fleet:
            guest = fleet.start_guest("host-a").guest_id
            fill(fleet.state_dir("host-a"))
            report = report_of(await fleet.move("worker", "host-a", "host-b"))
            assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
            assert "no room left for the journal" in (report.error or "")
            assert fleet.machines("host-b") == []
            await fleet.check_runs_only_at("host-a", guest)
            (fleet.state_dir("host-a") / "filler").unlink()
            assert (await fleet.move("worker", "host-a", "host-b")).phase is Phase.COMPLETE


async def test_a_full_journal_disk_at_the_destination_rolls_back_and_is_said_at_the_source(
    folder: Path,
) -> None:
    fleet = Fleet(folder)
    with tiny_disk(fleet.state_dir("host-b")):
        async with running_fleet(folder) as fleet:
            guest = fleet.start_guest("host-a").guest_id
            fill(fleet.state_dir("host-b"))
            report = report_of(await fleet.move("worker", "host-a", "host-b"))
            assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
            assert "no room left for the journal" in (report.error or "")
            assert fleet.machines("host-b") == []
            await fleet.check_runs_only_at("host-a", guest)
            (fleet.state_dir("host-b") / "filler").unlink()
            again = report_of(await fleet.move("worker", "host-a", "host-b"))
            assert again.phase is Phase.COMPLETE, again.error
            await fleet.check_runs_only_at("host-b", guest)


async def test_shared_storage_that_is_full_is_a_finding_and_not_a_loss(folder: Path) -> None:
    fleet = Fleet(folder)
    with tiny_disk(fleet.shared):
        async with running_fleet(folder) as fleet:
            guest = fleet.start_guest("host-a").guest_id
            report = report_of(await fleet.move("worker", "host-a", "host-b"))
            assert report.phase is Phase.COMPLETE, report.error
            fill(fleet.shared)
            back = report_of(await fleet.move("worker", "host-b", "host-a"))
            assert back.phase is Phase.ROLLED_BACK
            assert "no nonce could be written" in (back.error or "")
            assert "No space left" in (back.error or "")
            await fleet.check_runs_only_at("host-b", guest)
            (fleet.shared / "filler").unlink()
            assert (await fleet.move("worker", "host-b", "host-a")).phase is Phase.COMPLETE
            await fleet.check_runs_only_at("host-a", guest)


async def test_an_agent_starts_although_its_journal_disk_is_full(folder: Path, agent_log: AgentLog) -> None:
    fleet = Fleet(folder)
    with tiny_disk(fleet.state_dir("host-a")):
        # The beginning of a journal whose first entry found no room.
        journal = fleet.state_dir("host-a") / "journal"
        journal.mkdir()
        (journal / f"{'0' * 32}.log").write_bytes(b"")
        fill(fleet.state_dir("host-a"))
        async with running_fleet(folder) as fleet:
            guest = fleet.start_guest("host-a").guest_id
            assert agent_log.count("journal not ended") == 1
            await fleet.check_runs_only_at("host-a", guest)


async def test_a_destination_that_runs_out_of_memory_on_the_way_rolls_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ShortOfRam(PageConsumer):
        """Writes some batches, then meets a host without memory."""

        batches = 0

        def __call__(self, payload: memoryview) -> None:
            self.batches += 1
            if self.batches > 4:
                raise OutOfRam(first_gfn=0, wanted_bytes=1 << 20)
            super().__call__(payload)

    monkeypatch.setattr("migrate.destination.PageConsumer", ShortOfRam)
    async with running_fleet(folder, 'outage = "1s"') as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        with anyio.fail_after(30):
            report = report_of(await fleet.move("worker", "host-a", "host-b"))
        assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
        assert str(OutOfRam(first_gfn=0, wanted_bytes=1 << 20)) in (report.error or "")
        assert fleet.machines("host-b") == []
        await fleet.check_runs_only_at("host-a", guest)
