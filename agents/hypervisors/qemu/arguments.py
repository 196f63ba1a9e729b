"""The words of QEMU's command line: suboptions, sizes, and what has been read of a whole one so far.

Law: pure. Words are whatever some process was started with: nothing in here fails but with NotAdoptable.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from agents.hypervisors.qemu.errors import NotAdoptable
from agents.hypervisors.qemu.spec import DiskSpec, NetworkSpec

__all__ = ["MAX_DIGITS", "Read", "bytes_of", "fields_of", "is_number", "nothing_left"]

# vCPUs, nodes and bytes; no count of this world has more.
MAX_DIGITS: Final = 18
_SIZE: Final = re.compile(rf"(?:size=)?([0-9]{{1,{MAX_DIGITS}}})([KMGT]?)B?", re.IGNORECASE)
_SHIFT: Final = {"": 20, "K": 10, "M": 20, "G": 30, "T": 40}
# Suboptions that change nothing that a guest can see.
_IGNORED: Final = {
    "machine": frozenset({"dump-guest-core", "mem-merge"}),
    "accel": frozenset({"thread"}),
    "name": frozenset({"process", "debug-threads"}),
    "memory": frozenset(
        {"prealloc", "prealloc-threads", "merge", "dump", "reserve", "seal", "discard-data", "policy"}
    ),
    "blockdev": frozenset(
        {"node-name", "discard", "detect-zeroes", "auto-read-only", "file.aio", "file.locking"}
    ),
    "device": frozenset({"id"}),
}


def fields_of(value: str, first: str) -> dict[str, str]:
    """Read `a,b=c,d=e`; the first word may stand without its key, `first`. Doubled commas are one."""
    fields: dict[str, str] = {}
    for number, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, content = part.replace("\0", ",").partition("=")
        if not equals and number == 0:
            key, content = first, key
        elif not equals:
            content = "on"
        fields[key] = content
    return fields


@dataclass(slots=True)
class Read:
    """What was read so far. Suboptions of back ends are kept until what refers to them is read."""

    values: dict[str, object] = field(default_factory=dict)
    memories: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    main_memory: str = ""
    blocks: dict[str, dict[str, str]] = field(default_factory=dict)
    netdevs: dict[str, dict[str, str]] = field(default_factory=dict)
    # Read last: what they refer to may stand behind them.
    devices: list[str] = field(default_factory=list)
    disks: list[DiskSpec] = field(default_factory=list)
    networks: list[NetworkSpec] = field(default_factory=list)
    serials: int = 0
    has_nodefaults: bool = False
    problems: list[str] = field(default_factory=list)
    # Drives, and whether there is RAM, that were named as problems already: what refers to them is none of its own.
    lost_drives: set[str] = field(default_factory=set)
    has_lost_memory: bool = False

    def note(self, problem: str) -> None:
        """Keep a sentence."""
        self.problems.append(problem)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """What cannot be understood ends this argument, and no other."""
        try:
            yield
        except NotAdoptable as exc:
            self.problems += exc.problems


def bytes_of(words: str, option: str) -> int:
    """Give a size in bytes. Raises NotAdoptable."""
    match = _SIZE.fullmatch(words)
    if match is None:
        raise NotAdoptable(f"{option}: {words!r:.40} is no size")
    # A plain number is MiB for -m and bytes for -object.
    shift = 0 if option == "-object" and not match[2] else _SHIFT[match[2].upper()]
    return int(match[1]) << shift


def nothing_left(read: Read, what: str, fields: Mapping[str, str], kind: str) -> None:
    """Note what of an argument was not taken, and means something to a guest."""
    left = [f"{key}={value}" for key, value in fields.items() if key not in _IGNORED.get(kind, ())]
    if left:
        read.note(f"{what}: {', '.join(left)[:160]} has no place in a guest's spec")


def is_number(words: str) -> bool:
    """Say whether these are the digits of a count."""
    # Python refuses to read thousands of digits with an error of its own.
    return words.isascii() and words.isdecimal() and len(words) <= MAX_DIGITS
