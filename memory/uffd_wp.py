"""The dirty log that the kernel keeps: userfaultfd's asynchronous write-protection, read by PAGEMAP_SCAN.

Law: the log is of one process's mappings. Writes through any other mapping or by pwrite to the file are not in it
(vhost-user back ends, VFIO, our own MappedRam); punched holes are not reported either. Linux 6.7 or newer.

Pages are protected; the first write to one makes it writable and sets its bit in the page table, without a message
(0.6 us). One scan takes the written pages and protects them again, page by page atomically: a write falls
before the taking, and is in this harvest, or after it, and is in the next.

Who may read what: a page that a device had pinned (O_DIRECT) before the scan can still be written after it, unlogged.
After start and after each harvest, let the guest's devices drain, and only then copy.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memory import linux
from memory.dirty import TrackedArea, checked_areas
from memory.errors import TrackerError, TrackerLost
from memory.layout import PAGE_BYTES
from memory.runs import Runs, empty_runs, union

__all__ = ["TrackedArea", "UffdWpTracker", "open_uffd"]

# 768 KiB that the kernel fills in one call. A scan of 1 GiB takes 0.2 ms when nothing is dirty and 2.8 ms when all is;
# more scattered regions than this only mean one call more.
_REGIONS = 1 << 15


def open_uffd() -> int:
    """Make the userfaultfd: to be called inside the guest's process, which hands it over and closes its own copy.

    A copy that stays open in the guest keeps the protection (harmless) when the agent dies. The caller owns it.

    Raises:
        TrackerError: the kernel has no userfaultfd, or a sandbox forbids it.
    """
    try:
        return linux.userfaultfd()
    except OSError as exc:
        raise TrackerError(f"the guest's process cannot make a userfaultfd: {exc.strerror}") from exc


class UffdWpTracker:
    """The log of what one process writes to `areas`. Not thread-safe: one caller at a time.

    Args:
        uffd: made by `open_uffd` in that process; owned and closed by the tracker from here on.
        pid: that process, alive; its /proc/PID/pagemap must be readable (same user, or CAP_SYS_PTRACE).
        areas: its mappings of guest RAM, in any order.
    """

    def __init__(self, uffd: int, pid: int, areas: tuple[TrackedArea, ...]) -> None:
        self._uffd = uffd
        self._pid = pid
        self._pagemap = -1
        self._pidfd = -1
        self._registered: list[TrackedArea] = []
        self._is_started = False
        try:
            self._areas = checked_areas(areas)
        except TrackerError:
            self.stop()
            raise
        self._regions: NDArray[np.uint64] = np.empty((0, 3), dtype=np.uint64)

    @property
    def method(self) -> str:
        return "uffd-wp"

    def start(self) -> None:
        """Begin with an empty log. Once: after a failure or a stop a new userfaultfd is needed.

        Raises:
            TrackerError: the guest is as before, and this tracker is stopped.
        """
        if self._uffd < 0 or self._is_started:
            raise TrackerError("this tracker was started or stopped before; a new one is needed")
        if mmap.PAGESIZE != PAGE_BYTES:
            self.stop()
            raise TrackerError(f"the kernel's pages have {mmap.PAGESIZE} bytes, not {PAGE_BYTES}")
        try:
            # The pidfd first: /proc/PID is then the same process or gone, never a later one of that number.
            self._pidfd = os.pidfd_open(self._pid)
            self._pagemap = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._check_alive()
            self._shake_hands()
            for area in self._areas:
                self._register(area)
            for area in self._areas:
                linux.uffd_write_protect(self._uffd, area.address, area.pages * PAGE_BYTES)
        except TrackerError:
            self.stop()
            raise
        except OSError as exc:
            self.stop()
            raise TrackerError(f"cannot track the writes of process {self._pid}: {exc.strerror}") from exc
        self._regions = np.empty((_REGIONS, 3), dtype=np.uint64)
        self._is_started = True

    def harvest(self) -> Runs:
        """Take the pages written since start or the last harvest, and clear them.

        A page written while this runs is in this harvest or in the next, never in neither. On huge pages the log is
        as coarse as they are.

        Raises:
            TrackerLost: part of RAM is not protected any more: everything is dirty, and a new tracker is needed.
            TrackerError: the guest's process has ended, or the tracker is not running.
        """
        if not self._is_started:
            raise TrackerError("this tracker is not running")
        return self._scan(linux.pagemap_take_written)

    def _scan(self, scan: Callable[[int, int, int, NDArray[np.uint64]], tuple[int, int]]) -> Runs:
        found: list[Runs] = []
        try:
            for area in self._areas:
                at = area.address
                while at < area.end_address:
                    rows, at = scan(self._pagemap, at, area.end_address, self._regions)
                    found.append(self._runs_of(rows, area))
        except OSError as exc:
            self._check_alive()
            if exc.errno in (errno.EPERM, errno.EBADF):
                raise TrackerLost(
                    f"process {self._pid} is not write-protected any more: its log has a gap"
                ) from exc
            raise TrackerError(f"cannot read the dirty log of process {self._pid}: {exc.strerror}") from exc
        # Linux 6.18 says ESRCH for a process that has ended; one that ended within the scan just has no mappings left,
        # and a scan of nothing finds nothing: that is no clean guest.
        self._check_alive()
        # Linux gives the end of a walk of more than 512 rows too low (it keeps that of the last time its own buffer was
        # full: fs/proc/task_mmu.c, do_pagemap_scan), so that the tail is scanned twice, and is out of order.
        return found[0] if len(found) == 1 else union(np.concatenate(found), empty_runs())

    def absent(self) -> Runs:
        """Give the pages that are not in the guest's page table: given back, swapped out, or never touched.

        0.2 ms per GiB when they are few. Raises TrackerError as `harvest` does.
        """
        if not self._is_started:
            raise TrackerError("this tracker is not running")
        return self._scan(linux.pagemap_absent)

    def stop(self) -> None:
        """Leave the guest as it was before start. May be called twice, and before start."""
        self._is_started = False
        for area in self._registered:
            try:
                linux.uffd_unregister(self._uffd, area.address, area.pages * PAGE_BYTES)
            except OSError:
                # The process or its mapping is gone, and the registration with it; closing does the rest.
                continue
        self._registered.clear()
        self._uffd = _closed(self._uffd)
        self._pagemap = _closed(self._pagemap)
        self._pidfd = _closed(self._pidfd)

    def _shake_hands(self) -> None:
        try:
            linux.uffd_api(self._uffd, linux.UFFD_FEATURES_WP_LOG)
        except OSError as exc:
            raise TrackerError(
                "the kernel has no asynchronous write-protection for userfaultfd: it needs Linux 6.7 or newer"
            ) from exc

    def _register(self, area: TrackedArea) -> None:
        try:
            linux.uffd_register_wp(self._uffd, area.address, area.pages * PAGE_BYTES)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise TrackerError(
                    f"another tracker holds the RAM of process {self._pid}; end that migration first"
                ) from exc
            raise
        self._registered.append(area)

    def _runs_of(self, rows: int, area: TrackedArea) -> Runs:
        bounds = (self._regions[:rows, :2] - np.uint64(area.address)).astype(np.int64) // PAGE_BYTES
        bounds[:, 1] -= bounds[:, 0]
        bounds[:, 0] += area.first_gfn
        return bounds

    def _check_alive(self) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            raise TrackerError(f"the guest's process {self._pid} has ended")


def _closed(fd: int) -> int:
    """Close `fd` unless it is -1 already; give -1."""
    if fd >= 0:
        os.close(fd)
    return -1
