"""The disks as images: whether they can be written there, what format they are, what lies under them, room to grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.preflight.disks import Disk, disks_of
from migrate.preflight.evidence import MAX_NAMED, Inspection, named
from migrate.preflight.report import Check, Finding
from migrate.preflight.storage import is_another

__all__ = ["ACCESS", "CHAIN", "CHECKS", "FORMAT", "LOW_BYTES", "NETWORKED_POOLS", "POOL", "SPACE", "judge"]

ACCESS: Final = Check(
    check_id="disk-access",
    asked="Can the destination write to each disk that the guest writes to?",
    why="The guest there is a process of the agent's user; a disk that it cannot write gives the guest errors, or does "
    "not let it start",
    remedy="Mount the storage writable there, and give the agent's user access to the image",
)
FORMAT: Final = Check(
    check_id="disk-format",
    asked="Is each image of the format that its hypervisor was told?",
    why="An image that is opened as another format is read as other content",
    remedy="Correct the guest's description, or the image",
)
CHAIN: Final = Check(
    check_id="backing-chain",
    asked="Is each image under a disk (backing files, external data) the same at both ends?",
    why="A qcow2 image that lacks one of them cannot be opened; with another one under it the guest reads "
    "other content",
    remedy="Have every image of the chain at the same path below the shared directories of both hosts, or merge the "
    "chain (qemu-img rebase, block-stream)",
)
SPACE: Final = Check(
    check_id="disk-space",
    asked="Has the storage room for what the guest's disks may still grow by?",
    why="A thin image grows as the guest writes; on a full file system the guest stops or gets errors",
    remedy="Make room on the storage",
)
POOL: Final = Check(
    check_id="disk-pool",
    asked="Is each disk a volume of a storage pool that hosts can share?",
    why="Local storage pools do not support live migration: a pool of the same name on the other host has "
    "other volumes",
    remedy="Move the volume to a pool of a networked type (netfs, iscsi, rbd, gluster, ...), or mount one directory on "
    "both hosts",
)
CHECKS: Final = (ACCESS, FORMAT, CHAIN, SPACE, POOL)

# Below this a guest that installs updates fills its storage while it moves.
LOW_BYTES: Final = 1 << 30
# libvirt's types of pools, https://libvirt.org/storage.html. A pool may be networked and a volume differ all the same:
# its disks are proved like all others. A directory is what is mounted there, local or not: the proof tells.
DIRECTORY_POOLS: Final = frozenset({"dir", "fs"})
LOCAL_POOLS: Final = DIRECTORY_POOLS | {"logical", "disk", "zfs"}
NETWORKED_POOLS: Final = frozenset(
    {"netfs", "iscsi", "iscsi-direct", "scsi", "mpath", "rbd", "gluster", "sheepdog", "vstorage"}
)


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge each disk."""
    disks = disks_of(inspection)
    for disk in disks:
        yield _pool(inspection, disk)
        if not disk.is_somewhere:
            for check in (ACCESS, FORMAT, CHAIN, SPACE):
                yield check.ok(f"{disk} has no image")
            continue
        yield _access(inspection, disk)
        yield _format(inspection, disk)
        yield _chain(inspection, disk)
        yield _space(inspection, disk)
    if not disks:
        for check in CHECKS:
            yield check.ok(f"{inspection.guest.name} has no disk")


def _access(inspection: Inspection, disk: Disk) -> Finding:
    host, there = inspection.host.name, disk.there
    if there.error:
        return ACCESS.refused(f"{host} cannot open {disk}: {there.error}")
    if disk.is_harmless:
        return ACCESS.ok(f"{host} can read {disk}")
    if there.is_read_only:
        what = "device" if there.is_block else "file system"
        return ACCESS.refused(f"{disk} is on a {what} that is read-only on {host}")
    if there.write_error:
        return ACCESS.refused(f"{host} cannot open {disk} for writing: {there.write_error}")
    return ACCESS.ok(f"{host} can write to {disk}")


def _format(inspection: Inspection, disk: Disk) -> Finding:
    host, source, told = inspection.host.name, inspection.source_host, disk.facts.format
    here, there = disk.here, disk.there
    if here.error or there.error or not told:
        return FORMAT.unknown(
            f"{disk} could not be looked at: {here.error or there.error}"
            if here.error or there.error
            else f"the driver of {inspection.guest.name} does not say what format {disk} has",
            "",
        )
    if here.format != there.format:
        return FORMAT.refused(
            f"{disk} is {here.format or 'unknown'} on {source} and {there.format or 'unknown'} on {host}"
        )
    if there.format == told:
        snapshots = f", with {there.snapshots} internal snapshots" if there.snapshots else ""
        return FORMAT.ok(f"{disk} is {told} on both hosts{snapshots}")
    if told == "raw":
        # Both ends open it as raw, as it was opened until now: the guest itself may have written such a header.
        return FORMAT.warning(f"{disk} is opened as raw, and begins like an image of format {there.format}")
    return FORMAT.refused(f"{disk} is opened as {told}, and begins like {there.format}")


def _chain(inspection: Inspection, disk: Disk) -> Finding:
    host, source = inspection.host.name, inspection.source_host
    here, there = disk.here, disk.there
    # What a guest writes into a raw disk is nobody's chain.
    if disk.facts.format == "raw" or not (here.chain or there.chain or here.chain_error or there.chain_error):
        return CHAIN.ok(f"nothing lies under {disk}")
    for name, image in ((source, here), (host, there)):
        lacking = [one.error for one in image.chain if one.error]
        if image.chain_error:
            lacking.append(image.chain_error)
        if lacking:
            return CHAIN.refused(f"under {disk} on {name}: {'; '.join(lacking[:MAX_NAMED])}")
    if len(here.chain) != len(there.chain):
        return CHAIN.refused(
            f"under {disk} are {len(here.chain)} images on {source} and {len(there.chain)} on {host}"
        )
    for mine, other in zip(here.chain, there.chain, strict=True):
        if mine.path != other.path:
            return CHAIN.refused(f"under {disk} is {mine.path} on {source}, and {other.path} on {host}")
        if mine != other:
            return CHAIN.refused(
                f"{mine.path}, which is under {disk}, differs: {_described(mine.size_bytes, mine.format)} on "
                f"{source}, {_described(other.size_bytes, other.format)} on {host}"
            )
    return CHAIN.ok(f"the {len(there.chain)} images under {disk} are the same on both hosts")


def _described(size_bytes: int, format_: str) -> str:
    return f"{size_bytes} bytes of {format_ or 'unknown format'}"


def _space(inspection: Inspection, disk: Disk) -> Finding:
    host, there = inspection.host.name, disk.there
    grows_by = max(there.virtual_bytes - there.allocated_bytes, 0)
    if there.error or there.is_block or disk.is_remote or disk.is_harmless or not grows_by:
        return SPACE.ok(f"{disk} does not grow")
    found = f"{disk} may grow by {grows_by >> 20} MiB, and {host} sees {there.free_bytes >> 20} MiB free"
    if there.free_bytes < min(grows_by, LOW_BYTES):
        return SPACE.warning(found)
    if there.free_bytes < grows_by:
        return SPACE.warning(f"{found}: more is promised than there is")
    return SPACE.ok(found)


def _pool(inspection: Inspection, disk: Disk) -> Finding:
    ends = ((inspection.source_host, disk.here), (inspection.host.name, disk.there))
    for name, image in ends:
        if image.pool_error:
            return POOL.unknown(
                f"{name} cannot tell in which storage pool {disk} is: {image.pool_error}",
                f"Start libvirt on {name}, or take [storage] libvirt out of its agent's configuration",
            )
    pools = {image.pool for _, image in ends if image.pool}
    if not pools:
        return POOL.ok(f"{disk} is in no storage pool")
    words = " and ".join(f"of a {image.pool[:60]} pool on {name}" for name, image in ends if image.pool)
    if pools & LOCAL_POOLS and is_another(inspection, disk):
        return POOL.refused(f"{disk} is a volume {words}: local storage pools do not support live migration")
    if pools & (LOCAL_POOLS - DIRECTORY_POOLS):
        return POOL.warning(
            f"{disk} is a volume {words}, which hosts do not share; both have the same device all the same",
            "Let one host alone change the volumes of that pool while others use them",
        )
    if unknown := pools - LOCAL_POOLS - NETWORKED_POOLS:
        types = named(sorted(pool[:60] for pool in unknown))
        return POOL.warning(f"{disk} is a volume {words}: nothing is known here of {types} pools")
    return POOL.ok(f"{disk} is a volume {words}; it is proved as the disk that it is")
