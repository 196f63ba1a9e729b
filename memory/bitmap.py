"""The dirty pages of a guest that are still to be sent: one flag a page.

Law: pure, and not thread-safe: one thread harvests, merges and takes. What workers share is the RunCursor.

One byte a page, not one bit. Measured per 1 Mi pages (4 GiB of guest, 2 vCPUs): marking runs of 4 pages 1.6 ms,
runs out of bytes 0.2-1.5 ms; packed bits have to be unpacked for either (0.1 ms more each way) and numpy has no
"set these bits" at all. The price is 0.024 % of the guest's RAM, against 0.2 % for the digest's table.
"""

from __future__ import annotations

import numpy as np

from memory.runs import Runs, end_of, fill, runs_of_mask

__all__ = ["DirtyBitmap"]


class DirtyBitmap:
    """A set of pages below `total_pages`; empty at first."""

    def __init__(self, total_pages: int) -> None:
        self._flags = np.zeros(total_pages, dtype=np.bool_)

    @property
    def total_pages(self) -> int:
        return int(self._flags.size)

    @property
    def count(self) -> int:
        """Number of dirty pages (0.04 ms per 1 Mi pages)."""
        return int(np.count_nonzero(self._flags))

    def mark(self, runs: Runs) -> None:
        """Add the pages of `runs`, which lie below `total_pages`."""
        if end_of(runs) > self._flags.size:
            raise ValueError(f"runs end at page {end_of(runs)} of {self._flags.size}")
        fill(self._flags, runs, True)

    def unmark(self, runs: Runs) -> None:
        """Remove the pages of `runs`."""
        fill(self._flags, runs, False)

    def mark_all(self) -> None:
        """Add every page."""
        self._flags[:] = True

    def merge(self, other: DirtyBitmap) -> None:
        """Add the pages of another bitmap of the same guest; the other stays as it is."""
        if other._flags.size != self._flags.size:
            raise ValueError(f"bitmaps of {self._flags.size} and {other._flags.size} pages do not merge")
        np.logical_or(self._flags, other._flags, out=self._flags)

    def clear(self) -> None:
        """Remove every page."""
        self._flags[:] = False

    def runs(self) -> Runs:
        """Give the dirty pages as the longest runs."""
        return runs_of_mask(self._flags)

    def take_runs(self) -> Runs:
        """Give the dirty pages as the longest runs, and clear them."""
        runs = self.runs()
        self.clear()
        return runs

    def copy(self) -> DirtyBitmap:
        """Give a bitmap of its own with the same pages."""
        twin = DirtyBitmap(0)
        twin._flags = self._flags.copy()
        return twin
