"""The two ways to see an embedded guest's writes, and which one is taken here.

Law: a tracker asks the guest's process and the kernel; it decides nothing after `choose_tracker`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from typing import Final

import numpy as np

from agents.hypervisors.embedded.client import GuestClient
from agents.hypervisors.embedded.errors import EmbeddedError
from memory.dirty import TrackedArea, probe_kernel
from memory.errors import TrackerError
from memory.runs import Runs, runs_of_mask
from memory.uffd_wp import UffdWpTracker
from migrate.ports import DirtyTracker

__all__ = ["FORCE_HOOK_VARIABLE", "UffdTracker", "WriteHookTracker", "choose_tracker"]

# Set to anything but an empty string, it makes every migration use the write hook: for tests, and for a host whose
# kernel has a fault in its write-protection.
FORCE_HOOK_VARIABLE: Final = "VMFERRY_EMBEDDED_WRITE_HOOK"

_log = logging.getLogger(__name__)


def choose_tracker(client: GuestClient, total_pages: int) -> DirtyTracker:
    """Give the kernel's log where there is one, and unicorn's write hook elsewhere; says which in the log."""
    if os.environ.get(FORCE_HOOK_VARIABLE):
        _log.info(
            "dirty tracking method=write-hook pid=%d because=%s is set", client.pid, FORCE_HOOK_VARIABLE
        )
        return WriteHookTracker(client, total_pages)
    support = _kernel()
    if support.uffd_wp:
        _log.info("dirty tracking method=uffd-wp pid=%d", client.pid)
        return UffdTracker(client, total_pages)
    _log.info("dirty tracking method=write-hook pid=%d because=%s", client.pid, "; ".join(support.problems))
    return WriteHookTracker(client, total_pages)


# A kernel does not change while we run.
_kernel = functools.cache(probe_kernel)


class UffdTracker:
    """The kernel's log of the guest's process, on a userfaultfd that the guest makes for each start."""

    method: Final = "uffd-wp"

    def __init__(self, client: GuestClient, total_pages: int) -> None:
        self._client = client
        self._total_pages = total_pages
        self._tracker: UffdWpTracker | None = None

    def start(self) -> None:
        """Raises TrackerError: the guest is as before."""
        self.stop()
        try:
            uffd, address, pages = self._client.track()
        except EmbeddedError as exc:
            raise TrackerError(str(exc)) from exc
        if pages != self._total_pages:
            os.close(uffd)
            raise TrackerError(
                f"the guest's process maps {pages} pages of RAM instead of {self._total_pages}"
            )
        area = TrackedArea(address=address, pages=pages, first_gfn=0)
        tracker = UffdWpTracker(uffd, self._client.pid, (area,))
        tracker.start()
        self._tracker = tracker

    def harvest(self) -> Runs:
        """Raises TrackerError, TrackerLost."""
        if self._tracker is None:
            raise TrackerError("this tracker is not running")
        return self._tracker.harvest()

    def stop(self) -> None:
        """May be called twice."""
        if self._tracker is not None:
            self._tracker.stop()
            self._tracker = None


class WriteHookTracker:
    """The emulator's own log: about 1 us for each store of the guest, 7 stores for each page it writes.

    It sees what the CPU and the devices write, and works on any kernel. One of them per guest at a time.
    """

    method: Final = "write-hook"

    def __init__(self, client: GuestClient, total_pages: int) -> None:
        self._client = client
        self._total_pages = total_pages
        self._is_started = False

    def start(self) -> None:
        """Raises TrackerError: the guest is as before."""
        try:
            self._client.start_hook()
        except EmbeddedError as exc:
            raise TrackerError(str(exc)) from exc
        self._is_started = True

    def harvest(self) -> Runs:
        """Raises TrackerError."""
        if not self._is_started:
            raise TrackerError("this tracker is not running")
        try:
            bitmap = self._client.harvest_hook()
        except EmbeddedError as exc:
            raise TrackerError(str(exc)) from exc
        if len(bitmap) != (self._total_pages + 7) // 8:
            raise TrackerError(f"the guest's process gave a bitmap of {len(bitmap)} bytes")
        bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=self._total_pages, bitorder="little")
        return runs_of_mask(bits.view(np.bool_))

    def stop(self) -> None:
        """May be called twice."""
        if self._is_started:
            self._is_started = False
            # A guest that has ended has no hook any more.
            with contextlib.suppress(EmbeddedError):
                self._client.stop_hook()
