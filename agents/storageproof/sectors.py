"""Some sectors of an image, read past the host's page cache: what the storage has, not what this host remembers of it.

A block device's cached pages are never asked of the storage again: a preflight some minutes ago would make this one see
the past. Reading directly also writes back what this host has cached of just these sectors.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = [
    "DIGEST_BYTES",
    "MAX_OFFSETS",
    "SECTOR_BYTES",
    "choose_offsets",
    "digest_of",
    "digests_at",
    "open_image",
]

# The largest sector that disks have; O_DIRECT wants offsets and lengths of whole ones.
SECTOR_BYTES: Final = 4096
DIGEST_BYTES: Final = 16
# First, middle, last, and some that nobody can foresee. More cost a disk's seek each, at both ends.
RANDOM_OFFSETS: Final = 3
MAX_OFFSETS: Final = 8


def choose_offsets(size_bytes: int) -> tuple[int, ...]:
    """Choose the sectors to compare: first, middle, last, and some at random."""
    sectors = -(-size_bytes // SECTOR_BYTES)
    if sectors <= 0:
        return ()
    chosen = {0, sectors // 2, sectors - 1, *(secrets.randbelow(sectors) for _ in range(RANDOM_OFFSETS))}
    return tuple(number * SECTOR_BYTES for number in sorted(chosen))


def open_image(path: Path) -> tuple[int, bool]:
    """Open an image to read, past the cache if its file system can; say whether. Links are not followed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(path, flags | os.O_DIRECT), True
    except OSError as exc:
        if not isinstance(exc, PermissionError | FileNotFoundError):
            return os.open(path, flags), False
        raise


def digests_at(descriptor: int, offsets: Sequence[int]) -> tuple[bytes, ...]:
    """Digest the sectors at these offsets; one that cannot be read, or is no sector's start, gives an empty digest."""
    with mmap.mmap(-1, SECTOR_BYTES) as page:  # aligned, as O_DIRECT wants it
        return tuple(_digest(descriptor, offset, page) for offset in offsets[:MAX_OFFSETS])


def _digest(descriptor: int, offset: int, page: mmap.mmap) -> bytes:
    if offset < 0 or offset % SECTOR_BYTES or offset >= 1 << 62:
        return b""
    try:
        # Where the file was opened without O_DIRECT: a hint at least. Dirty pages stay.
        os.posix_fadvise(descriptor, offset, SECTOR_BYTES, os.POSIX_FADV_DONTNEED)
        size = os.preadv(descriptor, [page], offset)
    except OSError:
        return b""
    return digest_of(page[:size]) if size else b""


def digest_of(content: bytes) -> bytes:
    """Digest what was read of a sector: both ends do it alike, wherever they read it."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
