"""Locks of the kind that QEMU takes on an image: OFD locks on single bytes.

QEMU holds a shared lock on byte 100 + N for each permission N that it uses, and looks with an exclusive one whether
somebody else does. Source: QEMU, block/file-posix.c (RAW_LOCK_PERM_BASE); fcntl(2), "Open file description locks".
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from agents.kernelfiles import text_of

__all__ = ["WRITE_LOCK_BYTE", "hold", "is_refused", "writers_of"]

# 100 + BLK_PERM_WRITE (bit 1).
WRITE_LOCK_BYTE: Final = 101
# struct flock: type, whence, start, length, process (0 for OFD locks), and padding.
_FLOCK: Final = struct.Struct("hhqqi4x")
# A busy host has some thousands of locks; a line has 60 characters.
_MAX_LOCKS_BYTES: Final = 4 << 20


def hold(descriptor: int) -> None:
    """Take QEMU's lock of a writer; it ends when the descriptor is closed. Raises OSError."""
    _lock(descriptor, fcntl.F_RDLCK)


def is_refused(descriptor: int) -> bool:
    """Say whether an exclusive lock on the writer's byte is refused, as it must be while somebody holds it.

    One that is granted is given back. Raises OSError: the file system has no such locks.
    """
    try:
        _lock(descriptor, fcntl.F_WRLCK)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            return True
        raise
    _lock(descriptor, fcntl.F_UNLCK)
    return False


def writers_of(facts: os.stat_result, table: Path = Path("/proc/locks")) -> int:
    """Count the locks of QEMU's writers that processes of this host hold on a file."""
    wanted = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    return sum(_is_writer(line.split(), wanted) for line in text_of(table, _MAX_LOCKS_BYTES).splitlines())


def _is_writer(words: list[str], wanted: str) -> bool:
    """`1: OFDLCK ADVISORY READ -1 fe:00:1234 101 101`; a waiting lock has `->` in second place."""
    if len(words) != 8 or words[1] not in ("OFDLCK", "POSIX") or words[5] != wanted or not words[6].isdigit():
        return False
    last = int(words[7]) if words[7].isdigit() else 1 << 63
    return int(words[6]) <= WRITE_LOCK_BYTE <= last


def _lock(descriptor: int, kind: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, WRITE_LOCK_BYTE, 1, 0))
