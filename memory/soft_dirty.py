"""The older dirty log: soft-dirty bits in the page table, cleared through /proc/PID/clear_refs.

Law: reading the bits and clearing them are two steps, and a write that falls between them is lost. So the guest
MUST stand still while `harvest` runs: whoever uses this tracker stops it before and resumes it afterwards, each
round. Clearing is for the whole process and costs a walk of all its page tables. The bit of a page that the
kernel takes out of the page table (reclaim of shared memory, khugepaged) is lost with it: use it only on hosts
without swap, and prefer `memory.uffd_wp` wherever it works.

Source: Linux Documentation/admin-guide/mm/soft-dirty.rst and pagemap.rst (bit 55).
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from memory import linux
from memory.dirty import TrackedArea, checked_areas, probe_kernel
from memory.errors import TrackerError
from memory.layout import PAGE_BYTES
from memory.runs import Runs, empty_runs, runs_of_mask

__all__ = ["SoftDirtyTracker"]

_ENTRY_BYTES = 8
# 512 KiB of entries: 256 MiB of guest a read.
_ENTRIES = 1 << 16
_CLEAR_SOFT_DIRTY = b"4"


class SoftDirtyTracker:
    """The log of what one process writes to `areas`. Not thread-safe: one caller at a time.

    Args:
        pid: a process whose /proc/PID/pagemap can be read and clear_refs written (same user, or root).
        areas: its mappings of guest RAM, in any order.

    Raises:
        TrackerError: theirs: the areas cannot be.
    """

    def __init__(self, pid: int, areas: tuple[TrackedArea, ...]) -> None:
        self._pid = pid
        self._areas = checked_areas(areas)
        self._pagemap = -1
        self._clear_refs = -1

    @property
    def method(self) -> str:
        return "soft-dirty"

    def start(self) -> None:
        """Begin with an empty log.

        Raises:
            TrackerError: the kernel has no soft-dirty bits, or the process is gone or not ours to track.
        """
        if self._pagemap >= 0:
            raise TrackerError("this tracker is running already")
        if not probe_kernel().soft_dirty:
            raise TrackerError(
                "this kernel does not mark soft-dirty pages (CONFIG_MEM_SOFT_DIRTY); run the guest on Linux 6.7 "
                "or newer, whose userfaultfd needs no such option"
            )
        if mmap.PAGESIZE != PAGE_BYTES:
            raise TrackerError(f"the kernel's pages have {mmap.PAGESIZE} bytes, not {PAGE_BYTES}")
        try:
            self._pagemap = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._clear_refs = os.open(f"/proc/{self._pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
            os.write(self._clear_refs, _CLEAR_SOFT_DIRTY)
        except OSError as exc:
            self.stop()
            raise TrackerError(f"cannot track the writes of process {self._pid}: {exc.strerror}") from exc

    def harvest(self) -> Runs:
        """Take the pages written since start or the last harvest, and clear them, while the guest stands still.

        Raises:
            TrackerError: the guest's process has ended, or the tracker is not running.
        """
        if self._pagemap < 0:
            raise TrackerError("this tracker is not running")
        try:
            found = [self._dirty_runs(area) for area in self._areas]
            os.write(self._clear_refs, _CLEAR_SOFT_DIRTY)
        except OSError as exc:
            raise TrackerError(f"cannot read the dirty log of process {self._pid}: {exc.strerror}") from exc
        return np.concatenate(found) if found else empty_runs()

    def stop(self) -> None:
        """Let go of the process; the bits hurt nobody. May be called twice."""
        for fd in (self._pagemap, self._clear_refs):
            if fd >= 0:
                os.close(fd)
        self._pagemap = self._clear_refs = -1

    def _dirty_runs(self, area: TrackedArea) -> Runs:
        is_dirty = np.zeros(area.pages, dtype=np.bool_)
        first_entry = area.address // PAGE_BYTES
        for page in range(0, area.pages, _ENTRIES):
            count = min(_ENTRIES, area.pages - page)
            raw = os.pread(self._pagemap, count * _ENTRY_BYTES, (first_entry + page) * _ENTRY_BYTES)
            if len(raw) != count * _ENTRY_BYTES:
                # The page table of a process that has ended reads as an empty file.
                raise TrackerError(f"the guest's process {self._pid} has ended")
            entries = np.frombuffer(raw, dtype=np.uint64)
            is_dirty[page : page + count] = (entries & np.uint64(linux.PM_SOFT_DIRTY)) != 0
        return runs_of_mask(is_dirty, area.first_gfn)
