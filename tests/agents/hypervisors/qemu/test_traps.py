"""What loses writes of a guest without a word, each with the rule that keeps it from happening, and without it.

Law: a copy of RAM is kept by the dirty log alone and compared with the RAM, whole, when the guest stands still. Each
trap is shown to be one: the test without the rule must find stale pages, or it proves nothing about the rule.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import numpy as np
import pytest
from numpy.typing import NDArray

from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.describe import vcpu_threads
from agents.hypervisors.qemu.driver import QemuHypervisor
from agents.hypervisors.qemu.launch import launch
from agents.hypervisors.qemu.processmap import threads_to_trace
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.running import QemuRunningGuest
from agents.hypervisors.qemu.spec import Accel, DiskSpec, Format, QemuSpec
from agents.hypervisors.qemu.tracking import steal_uffd
from memory.digest import RamDigest, page_views
from memory.layout import PAGE_BYTES
from memory.runs import Runs, expand, pages_in, runs_of_gfns, whole
from tests.agents.hypervisors.qemu.conftest import PLAIN, QEMU, needs_qemu
from tests.agents.hypervisors.qemu.linux import Boot, Console
from tests.waiting import delay, until_blocking

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    needs_qemu(),
    pytest.mark.dealt("module"),
]

READER = """
/bin/workload set=8 rate=1 &
while true; do
  echo 3 > /proc/sys/vm/drop_caches
  dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null
done
"""
# Uses 64 MiB and frees them again: free-page reporting gives them back to the host some seconds later.
FREER = """
/bin/workload set=16 rate=2 &
dd if=/dev/urandom of=/used bs=1M count=64 2>/dev/null
echo FILLED
sleep 5
rm /used
echo FREED
wait
"""
DISK_BYTES = 64 << 20
BETWEEN_ROUNDS_S = 0.05
# Slow enough that reads are under way at every harvest.
READ_BYTES_PER_S = 20 << 20


def guest_spec(boot: Boot, **changed: object) -> QemuSpec:
    """A plain machine with a kernel."""
    values: dict[str, object] = {
        "kernel": boot.kernel,
        "initrd": boot.initrd(),
        "append": "console=ttyS0 quiet -- set=8 rate=10",
        **changed,
    }
    return replace(PLAIN, **values)  # type: ignore[arg-type]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vmferry-"))
    yield path
    shutil.rmtree(path)


@contextlib.asynccontextmanager
async def running(folder: Path, spec: QemuSpec) -> AsyncIterator[tuple[QemuRunningGuest, Console, Qmp]]:
    """A guest that works, held as by a migration, and its second monitor."""
    host = QemuHost(
        dir=folder / "q", binary=QEMU, shared_dirs=(folder,), kernel_dirs=(folder,), accels=(Accel.TCG,)
    )
    qmp, paths = await launch(spec, host, is_incoming=False)
    await qmp.aclose()
    console = Console(paths.log)
    try:
        await anyio.to_thread.run_sync(console.wait_beats, 3)
        guest = await QemuHypervisor(host, "host-a").open_guest(spec.guest_id)
        monitor = await Qmp.connect(paths.monitor)
        try:
            yield guest, console, monitor
        finally:
            await monitor.aclose()
            await guest.destroy()
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(paths.pid.read_text()), 9)


class Copy:
    """A copy of a guest's RAM."""

    def __init__(self, guest: QemuRunningGuest) -> None:
        self._ram = guest.ram
        self.pages: NDArray[np.uint8] = np.zeros((guest.ram.total_pages, PAGE_BYTES), np.uint8)

    def take(self, runs: Runs) -> None:
        for first, pages in runs.tolist():
            run = np.array([[first, pages]], dtype=np.int64)
            self._ram.gather(run, self.pages[first : first + pages].reshape(-1).data)

    def stale(self) -> int:
        """How many pages differ from the RAM; the guest stands still."""
        now = np.empty_like(self.pages)
        self._ram.gather(whole(len(now)), now.reshape(-1).data)
        return int(np.count_nonzero((now != self.pages).any(axis=1)))


@contextlib.contextmanager
def slow_disk(pid: int, disk: Path) -> Iterator[None]:
    """Let a process read from the device of a file no faster than READ_BYTES_PER_S, by its block I/O cgroup."""
    group = Path("/sys/fs/cgroup/blkio") / f"vmferry-test-{pid}"
    device = os.stat(disk).st_dev
    try:
        group.mkdir()
        limit = f"{os.major(device)}:{os.minor(device) // 16 * 16} {READ_BYTES_PER_S}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as exc:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"needs a block I/O cgroup to slow the disk down: {exc}")
    yield
    (Path("/sys/fs/cgroup/blkio") / "cgroup.procs").write_text(str(pid))
    group.rmdir()


@pytest.mark.parametrize("drains", [True, False], ids=["clear, drain, copy", "without the rule"])
async def test_data_of_reads_that_were_under_way_at_a_harvest_is_not_lost(folder: Path, drains: bool) -> None:
    boot = Boot.at(folder)
    disk = folder / "disk.raw"
    disk.write_bytes(os.urandom(DISK_BYTES))
    spec = guest_spec(
        boot,
        disks=(DiskSpec(path=str(disk), format=Format.RAW),),
        initrd=boot.initrd_with(READER, "virtio_pci", "virtio_blk"),
        append="console=ttyS0 quiet",
    )
    stale = 0
    async with running(folder, spec) as (guest, _, _):
        with slow_disk(guest._held.process.pid, disk):
            for _ in range(1 if drains else 5):
                stale += await _copy_by_log(guest, rounds=20, drains=drains)
                await guest.resume()
                guest.tracker.stop()
    assert (stale == 0) is drains, f"{stale} stale pages"


async def _copy_by_log(guest: QemuRunningGuest, *, rounds: int, drains: bool) -> int:
    """Copy as a migration does; give the stale pages at the end."""
    copy = Copy(guest)
    await anyio.to_thread.run_sync(guest.tracker.start)
    runs = await anyio.to_thread.run_sync(guest.ram.populated_runs)
    for _ in range(rounds):
        if drains:
            await guest.drain()
        await anyio.to_thread.run_sync(copy.take, runs)
        await delay(BETWEEN_ROUNDS_S)
        runs = await anyio.to_thread.run_sync(guest.tracker.harvest)
    if drains:
        await guest.drain()
    await anyio.to_thread.run_sync(copy.take, runs)
    await guest.pause()
    await anyio.to_thread.run_sync(copy.take, await anyio.to_thread.run_sync(guest.tracker.harvest))
    return await anyio.to_thread.run_sync(copy.stale)


async def test_pages_that_a_guest_gives_back_are_in_no_harvest_and_are_found_at_the_stop(
    folder: Path,
) -> None:
    boot = Boot.at(folder)
    spec = guest_spec(
        boot,
        has_balloon=True,
        initrd=boot.initrd_with(FREER, "virtio_pci", "virtio_balloon"),
        append="console=ttyS0 quiet",
    )
    async with running(folder, spec) as (guest, console, _):
        await anyio.to_thread.run_sync(console.wait_for, b"FILLED")
        copy = Copy(guest)
        digest = RamDigest(guest.ram.total_pages, bytes(16))
        await anyio.to_thread.run_sync(guest.tracker.start)
        copy.take(guest.ram.populated_runs())
        _digest_all(digest, copy)
        await anyio.to_thread.run_sync(console.wait_for, b"FREED")
        await anyio.to_thread.run_sync(
            lambda: until_blocking(
                lambda: pages_in(guest.ram.holes_among(digest.data_runs())) >= 10_000,
                "pages that were given back",
                within_s=20,
                every_s=0.2,
            )
        )
        copy.take(guest.tracker.harvest())
        await guest.pause()
        copy.take(guest.tracker.harvest())
        # The trap: pages that are zero now, and were not when they were copied.
        assert copy.stale() > 5000
        assert guest.discards
        discarded = guest.discarded_runs(digest.data_runs())
        copy.pages[expand(discarded)] = 0
        assert copy.stale() == 0
        # Asking did not make them again.
        assert pages_in(guest.ram.holes_among(discarded)) == pages_in(discarded)


def _digest_all(digest: RamDigest, copy: Copy) -> None:
    has_data = np.flatnonzero(copy.pages.any(axis=1))
    for gfns in np.array_split(has_data, max(len(has_data) // 256, 1)):
        digest.update(runs_of_gfns(gfns), page_views(np.ascontiguousarray(copy.pages[gfns]).reshape(-1).data))


async def test_holes_of_a_guest_stay_holes_when_its_ram_is_read(folder: Path) -> None:
    boot = Boot.at(folder)
    spec = guest_spec(
        boot,
        initrd=boot.initrd(),
        append="console=ttyS0 quiet -- set=8 rate=0",
    )
    async with running(folder, spec) as (guest, _, _):
        await guest.pause()
        before = pages_in(guest.ram.populated_runs())
        buffer = memoryview(bytearray(256 * PAGE_BYTES))
        for first in range(0, guest.ram.total_pages, 256):
            guest.ram.gather(np.array([[first, 256]], dtype=np.int64), buffer)
        assert pages_in(guest.ram.populated_runs()) == before
        assert before < guest.ram.total_pages * 3 // 4


@pytest.mark.parametrize("times", [50])
async def test_injection_leaves_a_guest_running_and_never_uses_a_vcpu(folder: Path, times: int) -> None:
    boot = Boot.at(folder)
    spec = guest_spec(
        boot,
        vcpus=2,
        initrd=boot.initrd(),
        append="console=ttyS0 quiet -- set=8 rate=10",
    )
    async with running(folder, spec) as (guest, console, monitor):
        vcpus = await vcpu_threads(monitor)
        pid = guest._held.process.pid
        threads = threads_to_trace(pid, vcpus)
        assert threads[0] == pid
        assert not set(threads) & set(vcpus)
        files = len(os.listdir(f"/proc/{pid}/fd"))
        seen = len(console.beats())
        for number in range(times):
            # Each of them in turn, the one that serves RCU and the workers too.
            os.close(await anyio.to_thread.run_sync(steal_uffd, pid, [threads[number % len(threads)]]))
        assert len(os.listdir(f"/proc/{pid}/fd")) == files
        beats = (await anyio.to_thread.run_sync(console.wait_beats, 2))[seen:]
        assert beats[-1].errors == 0
        # No standstill that a person or a heartbeat would notice.
        assert max(beat.max_gap_s for beat in beats) < 0.1
