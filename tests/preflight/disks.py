"""Disks that are not the same at both ends: the destination's agent has mounts of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread

from agents.api import CheckReport
from agents.hypervisors.qemu.spec import Cache, DiskSpec, Format
from agents.storageproof import locks
from tests.loopdevices import loop_of
from tests.needs import NotHere, need_fuse, need_program, need_root
from tests.preflight.cases import fits, problem, warned
from tests.preflight.stage import Build, Stage

MIB = 1 << 20


def image(build: Build, name: str = "guest.raw") -> Path:
    """Make a raw disk of noise on the shared storage."""
    path = build.folder / "shared" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(MIB))
    path.chmod(0o666)
    return path


def qcow2(path: Path, *arguments: str) -> Path:
    subprocess.run(
        [need_program("qemu-img"), "create", "-q", "-f", "qcow2", *arguments, path, "1M"], check=True
    )
    return path


def mounted(commands: str) -> dict[str, list[str]]:
    """What the destination's command begins with, so that it has these mounts and nobody else has."""
    need_root()
    script = f'{commands} && exec "$0" "$@"'
    prefix = ["unshare", "-m", "--propagation", "private", "sh", "-c", script]
    if subprocess.run(
        [*prefix[:-1], "mount -t tmpfs none /mnt"], capture_output=True, check=False
    ).returncode:
        raise NotHere("needs a machine where root may mount")
    return {"host-b": prefix}


async def of_embedded(build: Build, path: Path, commands: str, **settings: str) -> CheckReport:
    """Check an embedded guest on this disk against a host with these mounts."""
    async with build(prefixes=mounted(commands), **settings) as stage:
        return await stage.check(await stage.embedded(disk_path=str(path)))


async def of_qemu(stage: Stage, path: Path, **changed: object) -> CheckReport:
    disk = DiskSpec(path=str(path), format=Format.RAW)
    spec = {"format": disk.format, "cache": disk.cache, **changed}
    return await stage.check(await stage.qemu(disks=(DiskSpec(path=str(path), **spec),)))  # type: ignore[arg-type]


@fits
async def a_disk_that_both_see(build: Build) -> CheckReport:
    return await of_embedded(build, image(build), "true")


@fits
async def a_qcow2_disk_with_a_backing_file(build: Build) -> CheckReport:
    base = image(build, "base.raw")
    top = qcow2(base.with_name("top.qcow2"), "-b", "base.raw", "-F", "raw")
    async with build(qemu="\n") as stage:
        return await of_qemu(stage, top, format=Format.QCOW2)


@fits
async def a_disk_that_writes_through(build: Build) -> CheckReport:
    path = image(build)
    async with build(qemu="\n") as stage:
        return await of_qemu(stage, path, cache=Cache.DIRECTSYNC)


@fits
async def a_disk_that_is_only_read(build: Build) -> CheckReport:
    path = image(build)
    async with build(qemu="\n") as stage:
        return await of_qemu(stage, path, is_read_only=True)


@fits
async def three_disks(build: Build) -> CheckReport:
    disks = tuple(DiskSpec(path=str(image(build, f"{n}.raw")), format=Format.RAW) for n in range(3))
    async with build(qemu="\n") as stage:
        return await stage.check(await stage.qemu(disks=disks))


@problem("storage", "disk-access", "disk-content")
async def an_image_in_a_directory_that_is_empty_there(build: Build) -> CheckReport:
    path = image(build, "sub/guest.raw")
    return await of_embedded(build, path, f"mount -t tmpfs none {path.parent}")


def copied(build: Build, path: Path) -> str:
    """The commands that put a copy of a disk into another directory of the same name."""
    keep = build.folder / "copy.raw"
    return f"cp {path} {keep} && mount -t tmpfs none {path.parent} && cp {keep} {path}"


@problem("storage")
async def a_copy_in_a_directory_of_the_same_name(build: Build) -> CheckReport:
    path = image(build, "sub/guest.raw")
    return await of_embedded(build, path, copied(build, path))


@problem("storage", "disk-content")
async def another_file_that_is_mounted_over_the_disk(build: Build) -> CheckReport:
    path, other = image(build), image(build, "other.raw")
    return await of_embedded(build, path, f"mount --bind {other} {path}")


@problem("storage", "disk-content")
async def a_link_that_leads_to_another_disk_there(build: Build) -> CheckReport:
    path, other = image(build), image(build, "other.raw")
    link = path.parent / "links" / "guest.raw"
    link.parent.mkdir()
    link.symlink_to(path)
    return await of_embedded(build, link, f"mount -t tmpfs none {link.parent} && ln -s {other} {link}")


@problem("storage", "disk-access", "ownership")
async def a_storage_that_is_read_only_there(build: Build) -> CheckReport:
    path = image(build)
    shared = path.parent
    return await of_embedded(
        build, path, f"mount --bind {shared} {shared} && mount -o remount,ro,bind {shared}"
    )


@problem("backing-chain", "disk-file")
async def a_backing_file_that_is_missing_there(build: Build) -> CheckReport:
    base = image(build, "bases/base.raw")
    top = qcow2(base.parent.with_name("top.qcow2"), "-b", "bases/base.raw", "-F", "raw")
    prefixes = mounted(f"mount -t tmpfs none {base.parent}")
    async with build(qemu="\n", prefixes=prefixes) as stage:
        return await of_qemu(stage, top, format=Format.QCOW2)


@problem("backing-chain")
async def another_backing_file_there(build: Build) -> CheckReport:
    base, other = image(build, "base.raw"), image(build, "other.raw")
    top = qcow2(base.with_name("top.qcow2"), "-b", "base.raw", "-F", "raw")
    async with build(qemu="\n", prefixes=mounted(f"mount --bind {other} {base}")) as stage:
        return await of_qemu(stage, top, format=Format.QCOW2)


@problem("disk-cache")
async def a_disk_that_its_host_caches(build: Build) -> CheckReport:
    path = image(build)
    async with build(qemu="\n") as stage:
        return await of_qemu(stage, path, cache=Cache.WRITEBACK)


@warned("disk-format")
async def a_qcow2_image_that_the_guest_has_as_raw(build: Build) -> CheckReport:
    path = build.folder / "shared" / "guest.raw"
    path.parent.mkdir()
    async with build(qemu="\n") as stage:
        return await of_qemu(stage, qcow2(path))


@problem("disk-in-use")
async def an_image_that_somebody_there_writes(build: Build) -> CheckReport:
    path = image(build)
    # The embedded guest takes no such lock: whoever has it is another hypervisor.
    async with build() as stage:
        guest = await stage.embedded(disk_path=str(path))
        with path.open("r+b") as held:
            await anyio.to_thread.run_sync(locks.hold, held.fileno())
            return await stage.check(guest)


@warned("disk-space")
async def a_thin_image_that_the_storage_has_no_room_for(build: Build) -> CheckReport:
    need_root()
    shared = build.folder / "shared"
    shared.mkdir()
    with mounted_here(shared, "mount", "-t", "tmpfs", "-o", "size=8m", "none"):
        thin = shared / "thin.raw"
        thin.touch()
        os.truncate(thin, 64 * MIB)
        async with build() as stage:
            return await stage.check(await stage.embedded(disk_path=str(thin)))


@warned("disk-lock")
async def a_file_system_whose_locks_hold_on_one_host_alone(build: Build) -> CheckReport:
    bindfs = need_fuse("bindfs")
    path = image(build, "sub/guest.raw")
    behind = build.folder / "behind"
    path.parent.rename(behind)
    path.parent.mkdir()
    with mounted_here(path.parent, bindfs, str(behind)):
        again = f"umount -l {path.parent} && {bindfs} {behind} {path.parent}"
        return await of_embedded(build, path, again)


@contextmanager
def mounted_here(place: Path, *command: str) -> Iterator[None]:
    """Mount something there, for both hosts, while the block runs."""
    need_root()
    subprocess.run([*command, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@fits
async def a_block_device_that_both_see(build: Build) -> CheckReport:
    allowed = ("/dev/loop*",)
    with loop_of(image(build)) as device:
        disks = (DiskSpec(path=device, format=Format.RAW),)
        async with build(qemu="\n", storage='shared_devices = ["/dev/loop*"]') as stage:
            return await stage.check(await stage.qemu(disks=disks, place={"shared_devices": allowed}))
