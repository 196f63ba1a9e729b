"""Where the RAM of a QEMU process is: its mappings and the files behind them, by /proc.

Law: reads /proc and opens files through it; changes nothing in the process. What QEMU says of its RAM (names and host
addresses of its blocks) is checked against what the kernel says before anything is mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agents.hypervisors.qemu.errors import QemuGone
from memory.dirty import TrackedArea
from memory.layout import PAGE_BYTES
from migrate.errors import GuestRefused

__all__ = [
    "Mapping",
    "RamBlockPlace",
    "command_line",
    "mappings",
    "mappings_in",
    "open_block",
    "places_of",
    "threads_to_trace",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    is_shared: bool
    offset: int
    inode: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RamBlockPlace:
    """One block of RAM in the process: `address` there, `inode` of the file behind it."""

    name: str
    address: int
    size_bytes: int
    inode: int
    file_name: str

    def areas(self, first_gfn: int) -> tuple[TrackedArea, ...]:
        """Give what a dirty log watches; the block is one range of addresses, whatever the kernel made of it."""
        return (TrackedArea(address=self.address, pages=self.size_bytes // PAGE_BYTES, first_gfn=first_gfn),)


def mappings(pid: int) -> Iterator[Mapping]:
    """Give the mappings of a process, by address.

    Raises:
        QemuGone: it ended, or is not ours to look into.
    """
    try:
        raw = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError as exc:
        raise QemuGone(f"process {pid} cannot be looked into: {exc.strerror}") from exc
    yield from mappings_in(raw)


def mappings_in(raw: bytes) -> Iterator[Mapping]:
    """Give the mappings that stand in the content of a /proc/PID/maps."""
    # The kernel escapes the line feed in a file's name and no other character that splitlines() would split at.
    for line in filter(None, raw.decode(errors="replace").split("\n")):
        words = line.split(None, 5)
        start, _, end = words[0].partition("-")
        yield Mapping(
            start=int(start, 16),
            end=int(end, 16),
            is_shared=words[1].endswith("s"),
            offset=int(words[2], 16),
            inode=int(words[4]),
            name=words[5] if len(words) > 5 else "",
        )


def places_of(pid: int, blocks: Sequence[tuple[str, int, int]]) -> tuple[RamBlockPlace, ...]:
    """Find the files behind blocks of (name, host address, size in bytes), as QEMU names them.

    Raises:
        GuestRefused: a block is not wholly in one shared mapping of one file from its start on.
    """
    known = list(mappings(pid))
    places = []
    for name, address, size_bytes in blocks:
        pieces = [one for one in known if one.start < address + size_bytes and one.end > address]
        # A dirty log that ended badly, or madvise, leaves several mappings of one file that follow each other.
        at = address
        for one in pieces:
            if one.start > at or not one.is_shared or one.inode == 0 or one.inode != pieces[0].inode:
                break
            if one.offset != at - address - (at - one.start):
                break
            at = min(one.end, address + size_bytes)
        if at != address + size_bytes:
            raise GuestRefused(
                f"the guest's RAM block {name} is not one shared file of {size_bytes >> 20} MiB: start QEMU with "
                "-object memory-backend-memfd,...,share=on"
            )
        places.append(
            RamBlockPlace(
                name=name,
                address=address,
                size_bytes=size_bytes,
                inode=pieces[0].inode,
                file_name=pieces[0].name,
            )
        )
    return tuple(places)


def open_block(pid: int, place: RamBlockPlace) -> int:
    """Open the file behind a block through the process; the caller owns the fd.

    Raises:
        GuestRefused: it has no open file of it any more.
        QemuGone: the process ended.
    """
    folder = f"/proc/{pid}/fd"
    try:
        for number in os.listdir(folder):
            try:
                facts = os.stat(f"{folder}/{number}")
            except OSError:
                continue  # closed meanwhile
            if facts.st_ino == place.inode and facts.st_size >= place.size_bytes:
                fd = os.open(f"{folder}/{number}", os.O_RDWR | os.O_CLOEXEC)
                if os.fstat(fd).st_ino == place.inode:
                    return fd
                os.close(fd)
    except OSError as exc:
        raise QemuGone(f"process {pid} cannot be looked into: {exc.strerror}") from exc
    return _open_by_name(place)


def _open_by_name(place: RamBlockPlace) -> int:
    # memory-backend-file closes its file where the kernel lets it; hugetlbfs and tmpfs have it by name then.
    try:
        fd = os.open(place.file_name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        raise GuestRefused(
            f"the file behind the RAM block {place.name} cannot be opened: {exc.strerror}"
        ) from exc
    if os.fstat(fd).st_ino != place.inode:
        os.close(fd)
        raise GuestRefused(f"the file behind the RAM block {place.name} was replaced: {place.file_name}")
    return fd


def threads_to_trace(pid: int, vcpu_threads: Sequence[int]) -> list[int]:
    """Give threads in which a system call disturbs the guest least: the main thread, then others, never a vCPU."""
    try:
        others = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError as exc:
        raise QemuGone(f"process {pid} has ended") from exc
    return [tid for tid in [pid, *(one for one in others if one != pid)] if tid not in set(vcpu_threads)]


def command_line(pid: int) -> list[str]:
    """Give the arguments that a process was started with.

    Raises:
        QemuGone: it ended.
    """
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as exc:
        raise QemuGone(f"process {pid} has ended") from exc
    return [word.decode(errors="surrogateescape") for word in raw.rstrip(b"\0").split(b"\0")]
