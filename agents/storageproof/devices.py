"""What a block device says of itself, wherever it is attached: its world-wide name, its serial number, its map's UUID.

Source: Linux Documentation/ABI (sysfs-block, sysfs-block-device, sysfs-block-dm, sysfs-block-loop).
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from agents.kernelfiles import text_of

__all__ = ["LOOP", "device_number", "identity_of", "is_read_only", "size_of"]

LOOP: Final = "loop"
_SYS: Final = Path("/sys/dev/block")
# The first that a device has counts. A device-mapper UUID begins with what made it (LVM-, mpath-, CRYPT-).
_SOURCES: Final = (
    ("wwid", "wwid"),
    ("wwid", "device/wwid"),
    ("dm", "dm/uuid"),
    ("md", "md/uuid"),
    ("serial", "serial"),
    ("serial", "device/serial"),
    ("nbd", "backend"),
    (LOOP, "loop/backing_file"),
)
_MAX_BYTES: Final = 256
_BLKGETSIZE64: Final = 0x80081272


def device_number(facts: os.stat_result) -> str:
    """Give a block device's number as sysfs spells it."""
    return f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"


def identity_of(number: str, sys: Path = _SYS) -> str:
    """Give `KIND:WORDS` of the first thing that tells this device from others; nothing where it has none.

    A partition is told by its disk and where it begins.
    """
    folder = sys / number
    start = _words(folder / "start") if (folder / "partition").exists() else ""
    if start:
        folder = Path(os.path.realpath(folder)).parent
    for kind, name in _SOURCES:
        if words := _words(folder / name):
            return f"{kind}:{words}" + (f"+{start}" if start else "")
    return ""


def is_read_only(number: str, sys: Path = _SYS) -> bool:
    """Say whether the kernel lets nobody write to it."""
    return _words(sys / number / "ro") == "1"


def size_of(descriptor: int) -> int:
    """Give the size of an open block device. Raises OSError."""
    (size,) = struct.unpack("Q", fcntl.ioctl(descriptor, _BLKGETSIZE64, bytes(8)))
    return int(size)


def _words(path: Path) -> str:
    return " ".join(text_of(path, _MAX_BYTES).split())
