"""A cursor over runs that several worker threads pull their work from.

Law: pure; the only state is one position. Each page is given out exactly once, in order of gfn, and a
worker that is slow or fast changes nothing for the others.
"""

from __future__ import annotations

import threading

import numpy as np

from memory.runs import Runs, cut

__all__ = ["RunCursor"]


class RunCursor:
    """Give out `runs` in pieces, of at most `max_pages` pages where that is given. Safe to call from any thread.

    `runs` must not be changed afterwards. One piece costs a binary search under a lock, whatever the number
    of runs.
    """

    def __init__(self, runs: Runs, max_pages: int | None = None) -> None:
        if max_pages is not None and max_pages < 1:
            raise ValueError(f"a piece has at least 1 page, not {max_pages}")
        self._runs = runs
        self._ends = np.cumsum(runs[:, 1])
        self._total_pages = int(self._ends[-1]) if len(runs) else 0
        self._max_pages = self._total_pages if max_pages is None else max_pages
        self._given_pages = 0
        self._lock = threading.Lock()

    @property
    def remaining_pages(self) -> int:
        """Pages that nobody has taken yet."""
        return self._total_pages - self._given_pages

    def take_rest(self) -> Runs:
        """Take all that nobody has taken yet, whatever the limit."""
        with self._lock:
            low, self._given_pages = self._given_pages, self._total_pages
        return cut(self._runs, self._ends, low, self._total_pages)

    def take(self, max_pages: int | None = None) -> Runs:
        """Take the next pages: up to `max_pages`, and up to the cursor's own limit. No rows when all are taken.

        Runs are split where the limit falls; the array belongs to the caller.
        """
        if max_pages is not None and max_pages < 1:
            raise ValueError(f"a piece has at least 1 page, not {max_pages}")
        limit = self._max_pages if max_pages is None else min(max_pages, self._max_pages)
        with self._lock:
            low = self._given_pages
            high = min(low + limit, self._total_pages)
            self._given_pages = high
        return cut(self._runs, self._ends, low, high)
