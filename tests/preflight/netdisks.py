"""Network disks that both ends reach, or one of them, or nobody."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import anyio
import anyio.to_thread

from agents.api import CheckReport
from agents.hypervisors.qemu.spec import DiskSpec, Format
from tests.agents.diskservers import (
    IscsiTarget,
    gluster_file,
    iscsi_lun,
    iscsi_target,
    nbd_export,
    nfs_file,
    rbd_image,
)
from tests.preflight.cases import fits, problem
from tests.preflight.disks import image
from tests.preflight.stage import Build


async def of_export(build: Build, url: str, *, allowed: str = "", storage: str = "") -> CheckReport:
    """Check a guest on a network disk, or one that only its source's QEMU was allowed to have."""
    disks = (DiskSpec(path=url, format=Format.RAW),)
    async with build(qemu="\n", storage=f'network_disks = ["{allowed or url}"]\n{storage}') as stage:
        return await stage.check(await stage.qemu(disks=disks, place={"network_disks": (url,)}))


async def of_server(
    build: Build, serving: Callable[[Path], AbstractContextManager[str]], *, allowed: str = ""
) -> CheckReport:
    """Check a guest on a disk that this server has for as long."""
    with serving(image(build)) as url:
        return await of_export(build, url, allowed=allowed)


@fits
async def a_network_disk_that_both_reach(build: Build) -> CheckReport:
    return await of_server(build, nbd_export)


@fits
async def a_lun_that_both_reach(build: Build) -> CheckReport:
    return await of_server(build, iscsi_lun)


@fits
async def a_file_of_an_nfs_server_that_both_reach(build: Build) -> CheckReport:
    return await of_server(build, nfs_file)


@fits
async def a_file_of_a_gluster_volume_that_both_reach(build: Build) -> CheckReport:
    return await of_server(build, gluster_file)


@fits
async def an_image_in_ceph_that_both_reach(build: Build) -> CheckReport:
    return await of_server(build, rbd_image)


@problem("disk-access")
async def a_lun_that_nobody_may_write(build: Build) -> CheckReport:
    with iscsi_target(image(build)) as target:
        words = ("logicalunit", "update", "--lun", "1", "--params", "readonly=1")
        return await of_changed(build, target, *words)


@problem("storage", "disk-content", "disk-access")
async def a_lun_of_a_target_that_lets_nobody_in_any_more(build: Build) -> CheckReport:
    with iscsi_target(image(build)) as target:
        return await of_changed(build, target, "target", "unbind", "-I", "ALL")


async def of_changed(
    build: Build, target: IscsiTarget, mode: str, operation: str, *words: str
) -> CheckReport:
    """Check a guest on a LUN of which tgtadm was told something since it started."""
    disks, place = (DiskSpec(path=target.url, format=Format.RAW),), {"network_disks": (target.url,)}
    async with build(qemu="\n", storage=f'network_disks = ["{target.url}"]') as stage:
        guest = await stage.qemu(disks=disks, place=place)
        await anyio.to_thread.run_sync(lambda: target.tell(mode, operation, *words))
        return await stage.check(guest)


@problem("storage", "disk-content", "disk-access", "disk-file")
async def a_network_disk_that_the_configurations_do_not_name(build: Build) -> CheckReport:
    return await of_server(build, nbd_export, allowed="nbd://store1:10809/guest-*")
