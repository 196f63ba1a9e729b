"""Disks of QEMU guests that move: never two that may write, and every read is what was written."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from agents.hypervisors.qemu.incoming import QemuIncomingGuest
from agents.hypervisors.qemu.spec import DiskSpec, Format, QemuSpec
from migrate.compression import Compression
from migrate.errors import GuestRefused
from tests.agents.diskservers import (
    gluster_file,
    http_file,
    iscsi_lun,
    nbd_export,
    nfs_file,
    rbd_image,
)
from tests.agents.host.fleet import HOSTS
from tests.agents.host.qemu_guests import QemuGuests, qemu_fleet
from tests.agents.hypervisors.qemu.conftest import needs_qemu
from tests.loopdevices import loop_of
from tests.needs import skipped_where_not_here
from tests.waiting import looks, until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt("module"),
    needs_qemu(),
]

# Eight regions of 1 MiB: each is written with random data, its sum kept in RAM, and read back from the disk, past the
# guest's own cache, again and again. The data of every read lands in RAM by the host's O_DIRECT.
WORKER = """
/bin/workload set=16 rate=10 &
n=0
while true; do
  for r in 0 1 2 3 4 5 6 7; do
    dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null
    md5sum < /data > /sum$r
    dd if=/data of=/dev/vda bs=64k seek=$((r * 16)) conv=notrunc 2>/dev/null
    sync
    echo 3 > /proc/sys/vm/drop_caches
    for q in 0 1 2 3 4 5 6 7; do
      [ -f /sum$q ] || continue
      dd if=/dev/vda bs=64k skip=$((q * 16)) count=16 2>/dev/null | md5sum > /read
      cmp -s /read /sum$q || echo DISK-BAD region $q round $n
    done
    if [ -b /dev/vdb ]; then
      md5sum < /dev/vdb > /read
      [ -f /second ] || cp /read /second
      cmp -s /read /second || echo DISK-BAD second round $n
    fi
    n=$((n + 1))
    echo DISK-OK $n
  done
done
"""
# QEMU's locks on an image: bytes 100 + permission that it uses; BLK_PERM_WRITE is bit 1 (block/file-posix.c).
WRITE_LOCK_BYTE = 101


async def make_disk(guests: QemuGuests, format_: Format, name: str = "disk") -> DiskSpec:
    path = guests.fleet.shared / f"{name}.{format_}"
    await anyio.run_process(["qemu-img", "create", "-qf", str(format_), str(path), "64M"])
    return DiskSpec(path=str(path), format=format_)


async def start_worker(guests: QemuGuests, *disks: DiskSpec) -> QemuSpec:
    """Start a guest on host-a that writes and checks its first disk, and reads its second one."""
    spec = guests.spec(
        disks=disks,
        initrd=guests.boot.initrd_with(WORKER, "virtio_pci", "virtio_blk"),
        append="console=ttyS0 quiet",
    )
    await guests.start("host-a", spec)
    return spec


async def test_a_guest_that_writes_and_checks_its_disk_moves_and_no_two_qemus_may_write(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        disk = await make_disk(guests, Format.QCOW2)
        spec = await start_worker(guests, disk)
        await anyio.to_thread.run_sync(guests.console("host-a", spec).wait_for, b"DISK-OK", 10)
        writers: Counter[int] = Counter()

        async def watch() -> None:
            async for _ in looks(0.001):
                writers[write_locks(Path(disk.path))] += 1

        async with anyio.create_task_group() as beside:
            beside.start_soon(watch)
            for number in range(6):
                source, to = HOSTS[number % 2], HOSTS[1 - number % 2]
                # With zstd there are deltas too, whose bases a device's late write must not spoil.
                way = Compression.ZSTD if number % 4 < 2 else None
                report = await guests.move(spec, source, to, compression=way)
                await guests.check_moved(spec, report, source, to)
                console = guests.console(to, spec)
                done = console.read().count(b"DISK-OK")
                await anyio.to_thread.run_sync(console.wait_for, b"DISK-OK", done + 3)
            beside.cancel_scope.cancel()
        for host in HOSTS:
            assert b"DISK-BAD" not in guests.console(host, spec).read()
        assert writers[1] > 100
        assert max(writers) == 1, writers
        await anyio.to_thread.run_sync(guests.end_all)
        await until(lambda: write_locks(Path(disk.path)) == 0, "the end of the last QEMU")
        checked = await anyio.run_process(["qemu-img", "check", disk.path], check=False)
        # 3: clusters that leak after a kill; 2 would be a corruption.
        assert checked.returncode in (0, 3), checked.stdout


async def test_a_rolled_back_move_leaves_the_disk_with_the_source(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with qemu_fleet(folder) as guests:
        disk = await make_disk(guests, Format.RAW)
        spec = await start_worker(guests, disk)

        async def refuse_to_run(self: QemuIncomingGuest) -> None:
            raise GuestRefused("for this test")

        with monkeypatch.context() as patch:
            patch.setattr(QemuIncomingGuest, "resume", refuse_to_run)
            # The source's QEMU has given its disks away by now, and takes them back.
            report = await guests.move(spec, "host-a", "host-b")
        await guests.check_stayed(spec, report, "host-a", "host-b")
        assert "for this test" in (report.error or "")
        assert write_locks(Path(disk.path)) == 1
        console = guests.console("host-a", spec)
        done = console.read().count(b"DISK-OK")
        await anyio.to_thread.run_sync(console.wait_for, b"DISK-OK", done + 10)
        assert b"DISK-BAD" not in console.read()
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_guest_on_a_block_device_moves_there_and_back(folder: Path) -> None:
    image = folder / "device.raw"
    await anyio.run_process(["truncate", "-s", "64M", str(image)])
    with skipped_where_not_here(), loop_of(image) as device:
        async with qemu_fleet(folder, storage='shared_devices = ["/dev/loop*"]') as guests:
            spec = await move_there_and_back(guests, DiskSpec(path=device, format=Format.RAW))
            records = guests.fleet.shared / ".vmferry"
            assert any(
                path.name.startswith(spec.guest_id)
                for path in await anyio.to_thread.run_sync(listed, records)
            )


@pytest.mark.parametrize("serving", [nbd_export, iscsi_lun, nfs_file, gluster_file, rbd_image])
async def test_a_guest_on_a_network_disk_moves_there_and_back(
    folder: Path, serving: Callable[[Path], AbstractContextManager[str]]
) -> None:
    """Its records have no disk file to lie beside: they are in the first shared directory."""
    image = folder / "export.raw"
    await anyio.run_process(["truncate", "-s", "64M", str(image)])
    with skipped_where_not_here(), serving(image) as url:
        async with qemu_fleet(folder, storage=f'network_disks = ["{url}"]') as guests:
            await move_there_and_back(guests, DiskSpec(path=url, format=Format.RAW))


async def test_a_disk_that_a_web_server_has_moves_with_its_guest(folder: Path) -> None:
    image = folder / "second.raw"
    image.write_bytes(os.urandom(2 << 20))
    with skipped_where_not_here(), http_file(image) as url:
        async with qemu_fleet(folder, storage=f'network_disks = ["{url}"]') as guests:
            second = DiskSpec(path=url, format=Format.RAW, is_read_only=True)
            await move_there_and_back(guests, await make_disk(guests, Format.RAW), second)


async def move_there_and_back(guests: QemuGuests, *disks: DiskSpec) -> QemuSpec:
    """Start a guest that writes and checks these disks, and move it to host-b and back; give it."""
    spec = await start_worker(guests, *disks)
    await anyio.to_thread.run_sync(guests.console("host-a", spec).wait_for, b"DISK-OK", 2)
    for source, to in (HOSTS, HOSTS[::-1]):
        report = await guests.move(spec, source, to)
        await guests.check_moved(spec, report, source, to)
        console = guests.console(to, spec)
        done = console.read().count(b"DISK-OK")
        await anyio.to_thread.run_sync(console.wait_for, b"DISK-OK", done + 2)
    for host in HOSTS:
        assert b"DISK-BAD" not in guests.console(host, spec).read()
    return spec


def listed(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def write_locks(image: Path) -> int:
    """How many processes hold QEMU's lock to write an image."""
    inode = image.stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return sum(_covers(line, inode) for line in lines if "->" not in line)


def _covers(line: str, inode: int) -> bool:
    """Whether a lock is on this file and on that byte."""
    match = re.search(rf":{inode} (\d+) (\d+)$", line)
    return match is not None and int(match[1]) <= WRITE_LOCK_BYTE <= int(match[2])
