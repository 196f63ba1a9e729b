"""Disks that libvirt knows as volumes of a pool: local ones, and networked ones, which are proved all the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from agents.api import CheckReport
from tests.agents.diskservers import gluster_file, iscsi_lun, mounted_gluster, rbd_image
from tests.agents.libvirts import LIBVIRTD, make_pool, make_pool_of_url, running_libvirt
from tests.loopdevices import loop_of
from tests.needs import NotHere, need_file, need_program, need_root
from tests.preflight.cases import fits, problem
from tests.preflight.disks import MIB, copied, image, mounted_here, of_embedded
from tests.preflight.netdisks import of_export
from tests.preflight.stage import Build


@contextmanager
def in_a_pool(build: Build, path: Path, device: str = "") -> Iterator[str]:
    """Have libvirt know a disk as a volume of a pool; give the line for [storage] that names it.

    The pool is a directory, or the file system of a device that is mounted there.
    """
    need_libvirt()
    with running_libvirt(build.folder) as uri:
        make_pool(uri, "fs" if device else "dir", path.parent, *([device] if device else []))
        yield f'libvirt = "{uri}"'


@contextmanager
def file_system_at(build: Build, name: str) -> Iterator[str]:
    """Have a directory of the shared storage be a file system of its own; give its device."""
    need_root()
    place, behind = build.folder / "shared" / name, build.folder / "file-system"
    place.mkdir(parents=True)
    behind.touch()
    os.truncate(behind, 64 * MIB)
    subprocess.run([need_program("mkfs.ext4"), "-q", behind], check=True)
    with loop_of(behind) as device, mounted_here(place, "mount", device):
        place.chmod(0o755)
        yield device


@fits
async def a_volume_of_a_directory_pool_that_both_have(build: Build) -> CheckReport:
    path = image(build)
    with in_a_pool(build, path) as storage:
        async with build(storage=storage) as stage:
            return await stage.check(await stage.embedded(disk_path=str(path)))


@problem("storage", "disk-pool")
async def a_volume_of_a_file_system_of_each_host_alone(build: Build) -> CheckReport:
    with file_system_at(build, "sub") as device:
        path = image(build, "sub/guest.raw")
        with in_a_pool(build, path, device) as storage:
            return await of_embedded(build, path, copied(build, path), storage=storage)


@problem("storage", "disk-pool")
async def a_volume_of_a_pool_of_each_host_alone(build: Build) -> CheckReport:
    path = image(build, "sub/guest.raw")
    with in_a_pool(build, path) as storage:
        return await of_embedded(build, path, copied(build, path), storage=storage)


async def of_networked(
    build: Build, serving: Callable[[Path], AbstractContextManager[str]], kind: str
) -> CheckReport:
    """Check a guest on a network disk that libvirt knows as a volume of a pool of this type."""
    need_libvirt(kind)
    with serving(image(build)) as url, running_libvirt(build.folder) as uri:
        make_pool_of_url(uri, url, build.folder)
        return await of_export(build, url, storage=f'libvirt = "{uri}"')


@fits
async def a_volume_of_a_gluster_pool(build: Build) -> CheckReport:
    return await of_networked(build, gluster_file, "gluster")


@fits
async def a_volume_of_an_rbd_pool(build: Build) -> CheckReport:
    return await of_networked(build, rbd_image, "rbd")


@fits
async def a_volume_of_an_iscsi_pool(build: Build) -> CheckReport:
    return await of_networked(build, iscsi_lun, "iscsi-direct")


@contextmanager
def in_a_netfs_pool(build: Build, path: Path) -> Iterator[str]:
    """Have a disk lie in a file system of the network, which libvirt knows as a pool; give the line for [storage]."""
    need_libvirt()
    with gluster_file(path) as url:
        path.unlink()
        with mounted_gluster(url, path.parent) as source, running_libvirt(build.folder) as uri:
            make_pool(uri, "netfs", path.parent, *source, "glusterfs")
            yield f'libvirt = "{uri}"'


@fits
async def a_volume_of_a_netfs_pool_that_both_have(build: Build) -> CheckReport:
    path = image(build, "sub/guest.raw")
    with in_a_netfs_pool(build, path) as storage:
        async with build(storage=storage) as stage:
            return await stage.check(await stage.embedded(disk_path=str(path)))


@problem("storage")
async def a_volume_of_a_netfs_pool_that_is_another_there(build: Build) -> CheckReport:
    path = image(build, "sub/guest.raw")
    with in_a_netfs_pool(build, path) as storage:
        return await of_embedded(build, path, copied(build, path), storage=storage)


def need_libvirt(kind: str = "") -> None:
    """The daemon, and its driver for pools of this type where it is a package of its own."""
    if LIBVIRTD is None:
        raise NotHere("needs libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients")
    if kind:
        need_file(f"libvirt-daemon-driver-storage-{kind}", f"/usr/lib/*/libvirt/storage-backend/*_{kind}.so")
