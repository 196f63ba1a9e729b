"""What is at a disk's path on this host, looked at once: `migrate.facts.ImageFacts`."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from agents.storageproof import chains, devices, locks, mounts, pools, remote, sectors, urls
from agents.storageproof.formats import read_head
from agents.storageproof.places import SharedPlaces
from migrate.facts import ImageFacts

__all__ = ["kernel", "look_at", "size_at"]

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


def kernel() -> str:
    """Name the kernel that runs here, from this boot to the next; it is the same in each of its containers."""
    try:
        return _BOOT.read_text().strip()[:64]
    except OSError:
        return ""


def size_at(path: str, places: SharedPlaces) -> tuple[int, bool]:
    """Give a disk's size, and whether it is a block device; what cannot be looked at is empty and none. Blocks."""
    try:
        if urls.is_remote(path):
            return remote.size_of_url(path, places.urls), False
        descriptor, _ = sectors.open_image(places.locate(path))
    except (OSError, ValueError):
        return 0, False
    try:
        facts = os.fstat(descriptor)
        if stat.S_ISBLK(facts.st_mode):
            return devices.size_of(descriptor), True
        return (facts.st_size if stat.S_ISREG(facts.st_mode) else 0), False
    except OSError:
        return 0, False
    finally:
        os.close(descriptor)


def look_at(
    path: str, places: SharedPlaces, *, offsets: Sequence[int] = (), is_read_only: bool = False
) -> ImageFacts:
    """Look at a disk. Its path is hostile; so is its content. Blocks, and raises nothing."""
    try:
        if urls.is_remote(path):
            seen = remote.look_at_url(path, places.urls, offsets=offsets, is_read_only=is_read_only)
            return _with_pool(replace(seen, kernel=kernel()), path, places)
        located = places.locate(path)
        descriptor, is_direct = sectors.open_image(located)
    except (OSError, ValueError) as exc:
        return ImageFacts(error=_reason(exc), kernel=kernel())
    try:
        seen = _look(located, descriptor, places, offsets, is_direct=is_direct, is_read_only=is_read_only)
    except (OSError, ValueError) as exc:
        return ImageFacts(error=_reason(exc), kernel=kernel())
    finally:
        os.close(descriptor)
    return _with_pool(seen, path, places)


def _with_pool(seen: ImageFacts, path: str, places: SharedPlaces) -> ImageFacts:
    if not places.libvirt:
        return seen
    try:
        return replace(seen, pool=pools.pool_of(path, places.libvirt))
    except OSError as exc:
        return replace(seen, pool_error=_reason(exc))


def _look(
    path: Path,
    descriptor: int,
    places: SharedPlaces,
    offsets: Sequence[int],
    *,
    is_direct: bool,
    is_read_only: bool,
) -> ImageFacts:
    facts = os.fstat(descriptor)
    is_block = stat.S_ISBLK(facts.st_mode)
    if not is_block and not stat.S_ISREG(facts.st_mode):
        return ImageFacts(error=f"{path} is no file and no block device", kernel=kernel())
    number = devices.device_number(facts) if is_block else ""
    size_bytes = devices.size_of(descriptor) if is_block else facts.st_size
    room = None if is_block else os.fstatvfs(descriptor)
    mount = mounts.mount_of(descriptor)
    head = read_head(chains.head_of(path), size_bytes)
    chain, ends = chains.under(path, head.header, places) if head.header is not None else ((), "")
    return ImageFacts(
        name=path.name,
        is_block=is_block,
        is_covered=not is_block and _is_covered(path, mount),
        kernel=kernel(),
        device=number,
        identity=devices.identity_of(number) if is_block else "",
        size_bytes=size_bytes,
        allocated_bytes=size_bytes if is_block else facts.st_blocks * 512,
        virtual_bytes=head.virtual_bytes,
        digests=sectors.digests_at(descriptor, offsets),
        is_direct=is_direct,
        write_error="" if is_read_only else _write_error(path, is_block=is_block),
        writers=locks.writers_of(facts),
        file_system="" if is_block else mounts.file_system_of(mount),
        free_bytes=room.f_bavail * room.f_frsize if room is not None else 0,
        is_read_only=devices.is_read_only(number) if room is None else bool(room.f_flag & os.ST_RDONLY),
        format=head.format,
        snapshots=head.snapshots,
        chain=chain,
        chain_error=head.error or ends,
    )


def _is_covered(path: Path, mount: int) -> bool:
    """Say whether a mount lies on the file alone: its directory, which a nonce proves, then says nothing of it."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mounts.mount_of(folder) != mount
    finally:
        os.close(folder)


def _write_error(path: Path, *, is_block: bool) -> str:
    """Say why the agent's user, whose child the guest becomes, cannot write it.

    A file is opened: a server decides by more than mode bits. A device is not: udev reads one again that was open for
    writing.
    """
    if is_block:
        return "" if os.access(path, os.R_OK | os.W_OK) else "Permission denied"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as exc:
        return _reason(exc)
    return ""


def _reason(error: Exception) -> str:
    words = error.strerror if isinstance(error, OSError) else None
    return (words or str(error))[:500]
