"""How the guest's writes can be seen on this machine: asked of the kernel by trying, never by version.

Law: `probe_kernel` touches only memory and files of its own process; it decides nothing. A DirtyTracker is one of
`memory.uffd_wp`, `memory.soft_dirty`, or a driver's own (`write-hook`).
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

import numpy as np

from memory import linux
from memory.errors import TrackerError
from memory.layout import PAGE_BYTES

__all__ = ["TrackedArea", "TrackerSupport", "checked_areas", "probe_kernel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedArea:
    """One mapping of guest RAM in the guest's process: `pages` from `address` on are the gfns from `first_gfn` on."""

    address: int
    pages: int
    first_gfn: int

    @property
    def end_address(self) -> int:
        return self.address + self.pages * PAGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerSupport:
    """Which methods work here; `problems` has a sentence for each that does not."""

    uffd_wp: bool
    soft_dirty: bool
    problems: tuple[str, ...]


def checked_areas(areas: tuple[TrackedArea, ...]) -> tuple[TrackedArea, ...]:
    """Give the areas in order of gfn.

    Raises:
        TrackerError: theirs: the guest's process named areas that cannot be: none, empty, not on whole pages, or two
            for one gfn.
    """
    if not areas:
        raise TrackerError("no area of the guest's process to track")
    ordered = tuple(sorted(areas, key=lambda area: area.first_gfn))
    next_gfn = 0
    for area in ordered:
        if area.pages < 1 or area.address < 0 or area.address % PAGE_BYTES or area.end_address > 1 << 63:
            raise TrackerError(f"no mapping can have {area.pages} pages at {area.address:#x}")
        if area.first_gfn < next_gfn:
            raise TrackerError(f"two areas hold the page {area.first_gfn}")
        next_gfn = area.first_gfn + area.pages
    return ordered


def probe_kernel() -> TrackerSupport:
    """Try every method on a page of our own."""
    problems: list[str] = []
    uffd_wp = soft_dirty = False
    if mmap.PAGESIZE != PAGE_BYTES:
        problems.append(f"the kernel's pages have {mmap.PAGESIZE} bytes, not {PAGE_BYTES}")
    else:
        try:
            uffd_wp = _sees_a_write_by_uffd()
        except OSError as exc:
            problems.append(f"uffd-wp: {exc.strerror}; it needs Linux 6.7 with CONFIG_USERFAULTFD")
        soft_dirty = _marks_fresh_pages_soft_dirty()
        if not soft_dirty:
            problems.append("soft-dirty: this kernel is built without CONFIG_MEM_SOFT_DIRTY")
    return TrackerSupport(uffd_wp=uffd_wp, soft_dirty=soft_dirty, problems=tuple(problems))


def _sees_a_write_by_uffd() -> bool:
    uffd = linux.userfaultfd()
    try:
        linux.uffd_api(uffd, linux.UFFD_FEATURES_WP_LOG)
        with mmap.mmap(-1, PAGE_BYTES) as page, open("/proc/self/pagemap", "rb") as pagemap:
            address = _address_of(page)
            linux.uffd_register_wp(uffd, address, PAGE_BYTES)
            linux.uffd_write_protect(uffd, address, PAGE_BYTES)
            page[0] = 1
            regions = np.zeros((1, 3), dtype=np.uint64)
            rows, _ = linux.pagemap_take_written(pagemap.fileno(), address, address + PAGE_BYTES, regions)
            return rows == 1
    finally:
        os.close(uffd)


def _marks_fresh_pages_soft_dirty() -> bool:
    """Say whether the bit is set on a page that was just written; without kernel support it never is."""
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            page[0] = 1
            pagemap.seek(_address_of(page) // PAGE_BYTES * 8)
            (entry,) = struct.unpack("Q", pagemap.read(8))
    except (OSError, struct.error):
        return False
    return bool(entry & linux.PM_SOFT_DIRTY)


def _address_of(page: mmap.mmap) -> int:
    return int(np.frombuffer(page, dtype=np.uint8).ctypes.data)
