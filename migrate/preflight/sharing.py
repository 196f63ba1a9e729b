"""What makes it safe that two hosts have one disk open: locks, caches, file systems, and nobody else who writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.preflight.disks import Disk, disks_of
from migrate.preflight.evidence import Inspection, LockAnswer
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "CLUSTERED", "DISK_CACHE", "FILE_SYSTEM", "IN_USE", "LOCKS", "judge"]

LOCKS: Final = Check(
    check_id="disk-lock",
    asked="Do locks that one host takes on the storage hold for the other?",
    why="An image's lock is the second line: that one copy runs is decided by the ownership record, which needs no "
    "lock. Without it nothing stops a person from starting a second hypervisor on the disk by hand",
    remedy="Let the file system carry locks between hosts: NFS without nolock or local_lock, and a lock service on the "
    "server",
)
IN_USE: Final = Check(
    check_id="disk-in-use",
    asked="Does nobody at the destination write to the disk already?",
    why="Two writers destroy a disk, and the guest's hypervisor does not start there while another holds "
    "its image's lock",
    remedy="Find the process (lslocks, fuser) and end it",
)
DISK_CACHE: Final = Check(
    check_id="disk-cache",
    asked="Is each disk's cache mode safe for two hosts?",
    why="Pages that one host's cache holds are not what the other host reads. QEMU 7.2 asks the kernel to drop them "
    "when a guest arrives, and the kernel promises nothing: only a cluster file system keeps the caches of its hosts "
    "equal",
    remedy='Only cache = "none" or "directsync" is safe when two hosts open one disk on any storage',
)
FILE_SYSTEM: Final = Check(
    check_id="disk-filesystem",
    asked="Is each disk on a file system that hosts can share?",
    why="A file system that is made for one host is damaged when two have it mounted, whatever a nonce proves: each "
    "writes its own idea of what is free",
    remedy="Put the disk on NFS, a cluster file system, or a block device of its own",
)
CHECKS: Final = (LOCKS, IN_USE, DISK_CACHE, FILE_SYSTEM)

# They keep the page caches of their hosts equal (libvirt, virFileIsSharedFSOverride and virFileIsClusterFS, has the
# same but NFS). CephFS takes the right to cache from one client before another writes.
CLUSTERED: Final = frozenset({"gfs2", "ocfs2", "ceph", "gpfs"})
# Their caches are between a guest's writes and the storage on neither side.
_DIRECT: Final = frozenset({"none", "directsync"})
# Of one host: mounted twice they are destroyed, and a server is not among them.
_LOCAL: Final = frozenset(
    {
        *(
            "ext2",
            "ext3",
            "ext4",
            "xfs",
            "btrfs",
            "f2fs",
            "jfs",
            "reiserfs",
            "bcachefs",
            "zfs",
            "vfat",
            "exfat",
        ),
        *(
            "ntfs",
            "ntfs3",
            "tmpfs",
            "ramfs",
            "overlay",
            "devtmpfs",
            "squashfs",
            "iso9660",
            "erofs",
            "fuseblk",
        ),
    }
)


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge each disk that is somewhere."""
    disks = [disk for disk in disks_of(inspection) if disk.is_somewhere]
    for disk in disks:
        yield _locks(inspection, disk)
        yield _in_use(inspection, disk)
        yield _cache(inspection, disk)
        yield _file_system(inspection, disk)
    if not disks:
        for check in CHECKS:
            yield check.ok(f"{inspection.guest.name} has no disk that is anywhere")


def _locks(inspection: Inspection, disk: Disk) -> Finding:
    host, source = inspection.host.name, inspection.source_host
    if disk.is_harmless:
        return LOCKS.ok(f"{disk} is read-only: several may read it")
    if disk.is_remote or disk.here.is_block or disk.there.is_block:
        what = "reached by a URL" if disk.is_remote else "a block device"
        return LOCKS.ok(
            f"{disk} is {what}, and no two hosts share locks of it: the ownership record alone decides"
        )
    if disk.probe is None or not disk.probe.is_locked:
        return LOCKS.warning(f"no lock could be taken on {source} beside {disk}")
    if disk.reading is None or disk.reading.lock is LockAnswer.UNTRIED:
        why = f": {disk.reading.lock_error}" if disk.reading is not None and disk.reading.lock_error else ""
        return LOCKS.warning(f"{host} could not try a lock beside {disk}{why}")
    if disk.reading.lock is LockAnswer.GRANTED:
        return LOCKS.warning(f"{host} was given the lock beside {disk} that {source} held")
    return LOCKS.ok(f"a lock that {source} held beside {disk} was refused to {host}")


def _in_use(inspection: Inspection, disk: Disk) -> Finding:
    host = inspection.host.name
    # The source's own hypervisor is seen there as well where both are on one machine.
    own = int(disk.facts.is_locked) if disk.is_on_one_machine else 0
    others = disk.there.writers - own
    if others > 0 and not disk.there.error:
        return IN_USE.refused(f"{others} process(es) on {host} hold the lock to write {disk}")
    return IN_USE.ok(f"nobody else on {host} holds the lock to write {disk}")


def _cache(inspection: Inspection, disk: Disk) -> Finding:
    host, source, cache = inspection.host.name, inspection.source_host, disk.facts.cache
    kinds = disk.here.file_system, disk.there.file_system
    if disk.is_harmless:
        return DISK_CACHE.ok(f"{disk} is read-only: no cache of it grows stale")
    if disk.is_remote:
        return DISK_CACHE.ok(f"{disk} is reached by a URL, past every cache of its hosts")
    if cache in _DIRECT:
        if not disk.there.is_direct and not disk.there.error:
            return DISK_CACHE.refused(
                f"{disk} is opened past the cache (cache = {cache}), which its file system "
                f"({kinds[1] or 'unknown'}) on {host} cannot do",
                "Put it on a file system that knows O_DIRECT",
            )
        return DISK_CACHE.ok(f"{disk} is not cached by its hosts (cache = {cache})")
    if not cache and disk.is_on_one_machine:
        return DISK_CACHE.ok(f"{disk} is on one machine for both ends, with one cache of it")
    if not cache:
        return DISK_CACHE.unknown(
            f"the driver of {inspection.guest.name} does not say how {disk} is cached", ""
        )
    if CLUSTERED.issuperset(kinds):
        return DISK_CACHE.ok(
            f"{disk} is cached (cache = {cache}) by {kinds[0]} on {source} and {kinds[1]} on {host}, which keep "
            "their caches equal"
        )
    return DISK_CACHE.refused(
        f"{disk} is cached by its host (cache = {cache}), on {kinds[0] or 'no cluster file system'} on {source} and "
        f"{kinds[1] or 'no cluster file system'} on {host}"
    )


def _file_system(inspection: Inspection, disk: Disk) -> Finding:
    host, source = inspection.host.name, inspection.source_host
    here, there = disk.here, disk.there
    if disk.is_remote or here.is_block or there.is_block:
        return FILE_SYSTEM.ok(f"{disk} is on no file system of its hosts")
    if not here.file_system or not there.file_system:
        return FILE_SYSTEM.unknown(
            f"which file system {disk} is on is known on {source if here.file_system else host} only"
            if here.file_system or there.file_system
            else f"which file system {disk} is on is not known",
            "",
        )
    found = f"{disk} is on {here.file_system} on {source} and on {there.file_system} on {host}"
    local = _LOCAL & {here.file_system, there.file_system}
    if not local:
        return FILE_SYSTEM.ok(found)
    if disk.is_on_one_machine:
        return FILE_SYSTEM.ok(f"{found}, both of one machine")
    return FILE_SYSTEM.warning(f"{found}: {', '.join(sorted(local))} is made for one host")
