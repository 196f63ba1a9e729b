"""How much memory this host can still give to guests, and in which NUMA nodes it has any.

Law: reads files of /proc and /sys; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["free_memory_bytes", "memory_limits", "memory_nodes"]

_MEMINFO: Final = Path("/proc/meminfo")
_NODES: Final = Path("/sys/devices/system/node/has_memory")
# MAX_NUMNODES of a Linux for x86: 1 << CONFIG_NODES_SHIFT, 10 at most.
_MAX_NODES: Final = 1024
_CGROUP: Final = Path("/proc/self/cgroup")
_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")


def free_memory_bytes(
    meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP, cgroup_root: Path = _CGROUP_ROOT
) -> int:
    """Give what the kernel calls available, or what this process's cgroup (v2) allows, whichever is less.

    A file that is not there limits nothing; without /proc/meminfo nothing is free.
    """
    return max(min(_available(meminfo), *_cgroup_room(cgroup, cgroup_root)), 0)


def memory_nodes(nodes: Path = _NODES) -> tuple[int, ...]:
    """Give the NUMA nodes of this host that have memory; none where the kernel does not say."""
    found: list[int] = []
    for part in "".join(_lines(nodes)).split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal() and int(last or first) < _MAX_NODES:
            found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _available(meminfo: Path) -> int:
    for line in _lines(meminfo):
        key, _, rest = line.partition(":")
        if key == "MemAvailable":
            return int(rest.split()[0]) << 10
    return 0


def memory_limits(cgroup: Path = _CGROUP, cgroup_root: Path = _CGROUP_ROOT) -> list[int]:
    """Give what this process's cgroup (v2) and those above it may have at all; empty where nothing limits it."""
    limits = ("".join(_lines(group / "memory.max")) for group in _groups(cgroup, cgroup_root))
    return [int(limit) for limit in limits if limit.isdigit()]


def _cgroup_room(cgroup: Path, root: Path) -> list[int]:
    """Give the room of this process's group and of each above it; memory of guests belongs to all of them."""
    room = [1 << 63]
    for group in _groups(cgroup, root):
        limit = "".join(_lines(group / "memory.max"))
        used = "".join(_lines(group / "memory.current"))
        if limit.isdigit() and used.isdigit():
            room.append(int(limit) - int(used) + _reclaimable(group / "memory.stat"))
    return room


def _groups(cgroup: Path, root: Path) -> Iterator[Path]:
    here = next((line[3:] for line in _lines(cgroup) if line.startswith("0::")), None)
    if here is None:
        return
    group = root / here.lstrip("/")
    while group.is_relative_to(root):
        yield group
        group = group.parent


def _reclaimable(stat: Path) -> int:
    """Give what the group holds of the page cache and would lose first: it is no use that stands in the way."""
    return next((int(line.split()[1]) for line in _lines(stat) if line.startswith("inactive_file ")), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
