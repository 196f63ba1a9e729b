"""Which mount a file that is open was reached through, and which file system that is.

Source: proc(5), /proc/PID/fdinfo (`mnt_id`) and /proc/PID/mountinfo.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

__all__ = ["file_system_of", "mount_of", "parse_mountinfo"]

_MNT_ID: Final = re.compile(r"^mnt_id:\s*([0-9]+)$", re.MULTILINE)
# A host with ten thousand containers has some megabytes of mounts.
_MAX_TABLE_BYTES: Final = 16 << 20
# Names of file systems are short; what a FUSE program calls itself is its own business.
_MAX_NAME: Final = 64


def mount_of(descriptor: int) -> int:
    """Give the number of the mount that an open file was reached through; 0: the kernel does not say."""
    try:
        match = _MNT_ID.search(Path(f"/proc/self/fdinfo/{descriptor}").read_text())
    except OSError:
        return 0
    return int(match[1]) if match else 0


def file_system_of(mount: int) -> str:
    """Give the name of a mount's file system as the kernel spells it, such as `nfs4` or `fuse.sshfs`, or nothing."""
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            content = table.read(_MAX_TABLE_BYTES)
    except OSError:
        return ""
    return parse_mountinfo(os.fsdecode(content)).get(mount, "")


def parse_mountinfo(table: str) -> dict[int, str]:
    """Give the file system of each mount: the word after the lone dash."""
    found: dict[int, str] = {}
    for line in table.splitlines():
        before, dash, after = line.partition(" - ")
        number = before.partition(" ")[0]
        if dash and number.isdigit() and after.split():
            found[int(number)] = after.split()[0][:_MAX_NAME]
    return found
