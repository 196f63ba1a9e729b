"""The test guest's initramfs: made here, in memory, with no tool but Python. And the kernel that boots it.

Law: pure but for reading the files it is told to; formats the "newc" archive that Linux unpacks.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst
"""

from __future__ import annotations

import gzip
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "KERNEL_VARIABLE",
    "WORKLOAD",
    "Heartbeat",
    "KernelMissing",
    "find_kernel",
    "heartbeats",
    "initramfs",
]

KERNEL_VARIABLE: Final = "VMFERRY_TEST_KERNEL"
# The first words of the page that the workload counts its turns in, and where the count is (workload.c).
BEAT_MARK: Final = b"".join(
    (0x9E3779B97F4A7C15 * (number + 1 + 0x76667272) % (1 << 64)).to_bytes(8, "little") for number in range(4)
)
BEAT_OFFSET: Final = 32
WORKLOAD: Final = Path(__file__).with_name("workload")
_BOOT: Final = Path("/boot")
_BEAT: Final = re.compile(rb"HB (\d+) writes=(\d+) checks=(\d+) errors=(\d+) maxgap_us=(\d+)\r?\n")


class KernelMissing(Exception):
    """There is no Linux kernel here that can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """One line of the guest. `since_start_s` is by the guest's own clock, `max_gap_s` since the line before."""

    since_start_s: float
    writes: int
    checks: int
    errors: int
    max_gap_s: float


def heartbeats(console: bytes) -> list[Heartbeat]:
    """Read the whole lines of heartbeats in a console's output, oldest first."""
    return [
        Heartbeat(
            since_start_s=int(ms) / 1e3,
            writes=int(writes),
            checks=int(checks),
            errors=int(errors),
            max_gap_s=int(gap_us) / 1e6,
        )
        for ms, writes, checks, errors, gap_us in _BEAT.findall(console)
    ]


def find_kernel() -> Path:
    """Give a kernel image for x86-64: $VMFERRY_TEST_KERNEL, else the newest in /boot.

    Raises:
        KernelMissing: the world's; with the remedy.
    """
    if chosen := os.environ.get(KERNEL_VARIABLE):
        if not os.access(chosen, os.R_OK):
            raise KernelMissing(f"{KERNEL_VARIABLE} names {chosen}, which cannot be read")
        return Path(chosen)
    images = sorted(_BOOT.glob("vmlinuz*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    readable = [image for image in images if os.access(image, os.R_OK)]
    if not readable:
        found = f"{len(images)} there cannot be read by this user" if images else "none is there"
        raise KernelMissing(
            f"the test guest boots a Linux kernel from /boot, and {found}: install one (Debian: "
            f"apt-get install linux-image-amd64), or name one in {KERNEL_VARIABLE}"
        )
    return readable[-1]


def initramfs(files: Mapping[str, bytes] | None = None) -> bytes:
    """Pack the workload, as /init too unless that is among `files`, a console, and `files` by their paths.

    Every file can be executed.
    """
    archive = bytearray()
    folders = {"dev", "proc", "sys"}
    workload = WORKLOAD.read_bytes()
    contents = {"bin/workload": workload, "init": workload, **(files or {})}
    for name in contents:
        folders.update(str(parent) for parent in Path(name).parents if str(parent) != ".")
    for folder in sorted(folders):
        _add(archive, folder, stat.S_IFDIR | 0o755)
    _add(archive, "dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, content in contents.items():
        _add(archive, name, stat.S_IFREG | 0o755, content)
    _add(archive, "TRAILER!!!", 0)
    return gzip.compress(bytes(archive), 1, mtime=0)


def _add(
    archive: bytearray, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
) -> None:
    numbers = (len(archive) + 1, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    archive += b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
    archive += bytes(-len(archive) % 4)
    archive += content + bytes(-len(content) % 4)
