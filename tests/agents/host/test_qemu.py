"""Stock QEMU guests between two real agents: everything that a guest can be doing while it moves."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from agents.api import Check, CheckReport
from agents.hypervisors.qemu.spec import (
    Backend,
    DiskSpec,
    Format,
    MemorySpec,
    Vga,
)
from memory.layout import PAGE_BYTES
from migrate.compression import Compression
from tests.agents.host.fleet import HOSTS, cut_connections, in_precopy
from tests.agents.host.qemu_guests import qemu_fleet, vm_flags
from tests.agents.hypervisors.qemu.conftest import needs_qemu
from tests.hugepages import huge_pages
from tests.waiting import delay, until

pytestmark = [pytest.mark.anyio, pytest.mark.slow, needs_qemu(), pytest.mark.dealt]


def workload(words: str) -> str:
    return f"console=ttyS0 quiet -- {words}"


async def test_a_guest_moves_while_it_runs_and_comes_home(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        for source, to in (HOSTS, HOSTS[::-1]):
            writes = guests.console(source, spec).beats()[-1].writes
            report = await guests.move(spec, source, to)
            await guests.check_moved(spec, report, source, to)
            assert guests.console(to, spec).beats()[-1].writes > writes
            assert report.tracking in ("uffd-wp", "soft-dirty")
            assert report.downtime is not None
            assert report.downtime.total_s < 1


@pytest.mark.parametrize("rate", [0, 200])
async def test_a_guest_moves_whatever_it_writes(folder: Path, rate: int) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec(append=workload(f"set=64 rate={rate} page=1"))
        await guests.start("host-a", spec)
        # Long enough for a machine that is busy with other things: what is tried is the way, not its speed.
        report = await guests.move(spec, "host-a", "host-b", downtime_limit_s=2.0)
        await guests.check_moved(spec, report, "host-a", "host-b")


@pytest.mark.parametrize("cuts", [0, 3])
async def test_a_guest_that_writes_more_than_the_link_carries_moves_by_deltas(
    folder: Path, cuts: int
) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec(append=workload("set=64 rate=200"))
        await guests.start("host-a", spec)
        job = await guests.fleet.start(
            spec.guest_id,
            "host-a",
            "host-b",
            audit=True,
            bandwidth_bytes_per_s=24 << 20,
            downtime_limit_s=1.0,
        )
        await guests.fleet.until("host-a", job, in_precopy)
        for _ in range(cuts):
            await delay(0.3)
            cut_connections(guests.fleet.data_ports["host-b"])
        view = await guests.fleet.follow("host-a", job)
        assert view.report is not None
        await guests.check_moved(spec, view.report, "host-a", "host-b")
        counts = view.report.counts
        assert counts.delta_pages > 1000
        assert counts.delta_bytes < counts.delta_pages * PAGE_BYTES / 20


async def test_a_large_guest_that_is_mostly_empty_stays_so(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec(memories=(MemorySpec(name="ram0", size_bytes=4 << 30),))
        await guests.start("host-a", spec)
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_moved(spec, report, "host-a", "host-b")
        assert report.ram_bytes == 4 << 30
        # Reading or proving its holes would have made them.
        assert _shared_memory_kib(guests.pid("host-b", spec)) < 1 << 20


@pytest.mark.dealt
@pytest.mark.parametrize(
    "memories",
    [
        (
            MemorySpec(name="ram0", size_bytes=160 << 20, node=0),
            MemorySpec(name="ram1", size_bytes=160 << 20, node=1),
        ),
        (MemorySpec(name="pc.ram", size_bytes=256 << 20, backend=Backend.FILE),),
        (MemorySpec(name="mem", size_bytes=256 << 20, page_bytes=2 << 20),),
    ],
    ids=["two NUMA nodes", "a file", "huge pages"],
)
async def test_every_backend_of_ram_moves(folder: Path, memories: tuple[MemorySpec, ...]) -> None:
    with huge_pages(256 if memories[0].page_bytes else 0):
        async with qemu_fleet(folder) as guests:
            spec = guests.spec(memories=memories, append=workload("set=96 rate=20"))
            await guests.start("host-a", spec)
            # A write to a huge page makes all of it dirty: on a busy machine that is more than moves in 300 ms.
            report = await guests.move(spec, "host-a", "host-b", downtime_limit_s=10.0)
            await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_guest_with_all_devices_moves_there_and_back_ten_times(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        disk = guests.fleet.shared / "disk.qcow2"
        await anyio.run_process(["qemu-img", "create", "-qf", "qcow2", str(disk), "64M"])
        spec = guests.spec(
            vcpus=2,
            vga=Vga.STD,
            has_balloon=True,
            has_rng=True,
            disks=(DiskSpec(path=str(disk), format=Format.QCOW2),),
        )
        await guests.start("host-a", spec)
        for number in range(20):
            source, to = HOSTS[number % 2], HOSTS[1 - number % 2]
            way = Compression.ZSTD if number % 4 < 2 else None
            report = await guests.move(spec, source, to, compression=way)
            await guests.check_moved(spec, report, source, to)


async def test_an_offline_move_copies_a_guest_that_stands_still(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        report = await guests.move(spec, "host-a", "host-b", is_offline=True)
        await guests.check_moved(spec, report, "host-a", "host-b")
        assert report.tracking.startswith("none")


async def test_a_link_that_breaks_on_the_way_ends_nothing(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        job = await guests.fleet.start(
            spec.guest_id, "host-a", "host-b", audit=True, bandwidth_bytes_per_s=16 << 20
        )
        await guests.fleet.until("host-a", job, in_precopy)
        for _ in range(5):
            await delay(0.1)
            assert cut_connections(guests.fleet.data_ports["host-b"]) > 0
        view = await guests.fleet.follow("host-a", job)
        assert view.report is not None
        await guests.check_moved(spec, view.report, "host-a", "host-b")
        assert view.report.link_breaks >= 5


async def test_a_cancelled_move_leaves_qemu_as_it_was(folder: Path) -> None:
    from agents.api import Cancel, Done

    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        pid = guests.pid("host-a", spec)
        assert pid is not None
        files = _open_files(pid)
        async with guests.monitor("host-a", spec) as qmp:
            before = await qmp.execute("query-migrate-capabilities")
        job = await guests.fleet.start(spec.guest_id, "host-a", "host-b", bandwidth_bytes_per_s=4 << 20)
        await guests.fleet.until("host-a", job, in_precopy)
        assert "uw" in vm_flags(pid)
        assert isinstance(await guests.fleet.ask("host-a", Cancel(job=job)), Done)
        view = await guests.fleet.follow("host-a", job)
        assert view.report is not None
        await guests.check_stayed(spec, view.report, "host-a", "host-b")
        assert "uw" not in vm_flags(pid)
        assert _open_files(pid) == files
        async with guests.monitor("host-a", spec) as qmp:
            assert await qmp.execute("query-migrate-capabilities") == before
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_probe_leaves_qemu_as_it_was_and_a_move_ends_one(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec(append=workload("set=32 rate=20"))
        await guests.start("host-a", spec)
        pid = guests.pid("host-a", spec)
        assert pid is not None
        files = _open_files(pid)
        fleet = guests.fleet
        report = await fleet.ask("host-a", Check(guest=spec.guest_id, to="host-b", predict_s=1.0))
        assert isinstance(report, CheckReport)
        assert report.prediction is not None, report.unpredicted
        load = report.prediction.load
        assert load is not None
        assert load.windows[-1].pages > load.windows[0].pages > 0
        assert load.populated_bytes < spec.ram_bytes
        assert "uw" not in vm_flags(pid)
        assert _open_files(pid) == files
        await guests.check_runs("host-a", spec)

        async def look() -> None:
            answer = await fleet.ask("host-a", Check(guest=spec.guest_id, to="host-b", predict_s=25.0))
            assert isinstance(answer, CheckReport)
            assert "began while it was watched" in answer.unpredicted

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            await until(lambda: "uw" in vm_flags(pid), "its dirty log", within_s=20)
            moved = await guests.move(spec, "host-a", "host-b", downtime_limit_s=2.0)
        await guests.check_moved(spec, moved, "host-a", "host-b")


def _shared_memory_kib(pid: int | None) -> int:
    return _status(pid, "RssShmem")


def _status(pid: int | None, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise AssertionError(key)


def _open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
