"""Copies of pages as they were last sent: what the next version of a page is a delta to.

Law, **a base is what the other end has**: a copy is made of the very bytes that go into a payload, and used only in a
later round, which begins when everything of the one before it was acknowledged. Whoever cannot wait for that (a round
that was cut off) has its pages forgotten, and they travel whole.

Bounded: `max_bytes` of pages, and 16 bytes of index for each. Pages that a guest writes again are worth a copy, the
others never: which ones those are the dirty log tells. A set that is larger than the bound keeps the pages that
it has: to let the oldest go for the newest, where all are written in turn, would find none of them.
"""

from __future__ import annotations

import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memory.layout import PAGE_BYTES
from memory.runs import Gfns, Runs, clip_pages, expand, intersect, pages_in, runs_of_gfns, subtract

__all__ = ["Pages", "PageHistory"]

_WORDS: Final = PAGE_BYTES // 8

# Pages as rows of words.
Pages = NDArray[np.uint64]


class PageHistory:
    """Keeps at most `max_bytes` of pages; memory is taken when a page is stored, not before.

    Any thread may call, with pages that are no other's just then. Pages that are being sent by their base must not give
    way: `keep` comes between rounds, or in one without bases.
    """

    def __init__(self, max_bytes: int) -> None:
        capacity = max(max_bytes, 0) // PAGE_BYTES
        try:
            # empty, not zeros: untouched memory is none.
            self._pages: Pages = np.empty((capacity, _WORDS), dtype=np.uint64)
        except MemoryError:
            # A host that promises no more than it has. Pages travel whole then, which is no reason not to move.
            capacity, self._pages = 0, np.empty((0, _WORDS), dtype=np.uint64)
        self._capacity = capacity
        # Sorted gfns, and the slot of each.
        self._gfns: Gfns = np.empty(0, dtype=np.int64)
        self._slots: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        # Slots that were given back, and the first of those that nobody has had.
        self._free: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._untouched = 0
        self._is_stored = np.zeros(capacity, dtype=np.bool_)
        # Around the copies too: a slot must not get another page while it is written.
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Pages that there is room for."""
        return self._capacity

    @property
    def kept_pages(self) -> int:
        """Pages that have room here, stored or not."""
        return int(self._gfns.size)

    def keep(self, runs: Runs) -> None:
        """Have room for these pages, as far as there is any; others give way."""
        if self._capacity == 0 or len(runs) == 0:
            return
        with self._lock:
            kept = runs_of_gfns(self._gfns)
            new = subtract(runs, kept)
            lacking = pages_in(new) - (self._capacity - self._gfns.size)
            if lacking > 0:
                self._drop(clip_pages(subtract(kept, runs), lacking))
            gfns = expand(clip_pages(new, self._capacity - self._gfns.size))
            slots = self._take_slots(gfns.size)
            self._is_stored[slots] = False
            all_gfns = np.concatenate((self._gfns, gfns))
            order = np.argsort(all_gfns, kind="stable")
            self._gfns, self._slots = all_gfns[order], np.concatenate((self._slots, slots))[order]

    def clear(self) -> None:
        """Keep nothing, and give the memory back."""
        with self._lock:
            if self._gfns.size == 0:
                return
            self._gfns, self._slots, self._free = self._gfns[:0], self._slots[:0], self._free[:0]
            self._untouched = 0
            self._pages = np.empty_like(self._pages)

    def forget(self, runs: Runs) -> None:
        """What the other end has of these pages is not known any more."""
        with self._lock:
            _, slots = self._find(expand(intersect(runs, runs_of_gfns(self._gfns))))
            self._is_stored[slots] = False

    def split(self, runs: Runs) -> tuple[Runs, Runs, Runs]:
        """Part `runs` into pages that are not kept, that will be when they are sent, and that have a base."""
        with self._lock:
            # The shorter one first: `runs` may have a thousand times as many rows.
            kept = intersect(runs_of_gfns(self._gfns), runs)
            based = intersect(kept, runs_of_gfns(self._gfns[self._is_stored[self._slots]]))
        return subtract(runs, kept) if len(kept) else runs, subtract(kept, based), based

    def exchange(self, runs: Runs, pages: Pages, out: Pages) -> None:
        """Take the rows of `pages` as what is sent of `runs`, of which each has a base; `out`: their XOR with those."""
        gfns = expand(runs)
        with self._lock:
            places, slots = self._find(gfns)
            if places.size != gfns.size or not self._is_stored[slots].all():
                raise ValueError("a page has no base")
            rows = _rows(slots)
            np.bitwise_xor(self._pages[rows], pages, out=out)
            self._pages[rows] = pages

    def store(self, runs: Runs, pages: Pages) -> None:
        """Take the rows of `pages` as what is sent of `runs`; those that are not kept are passed over."""
        if self._gfns.size == 0:
            return
        gfns = expand(runs)
        with self._lock:
            places, slots = self._find(gfns)
            if places.size:
                self._pages[_rows(slots)] = pages if places.size == len(pages) else pages[places]
                self._is_stored[slots] = True

    def _find(self, gfns: Gfns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the places in `gfns` of those that are kept, and their slots."""
        if self._gfns.size == 0:
            return gfns[:0], gfns[:0]
        at = np.minimum(np.searchsorted(self._gfns, gfns), self._gfns.size - 1)
        places = np.flatnonzero(self._gfns[at] == gfns)
        return places, self._slots[at[places]]

    def _take_slots(self, count: int) -> NDArray[np.int64]:
        slots, self._free = self._free[:count], self._free[count:]
        first, self._untouched = self._untouched, self._untouched + count - slots.size
        return np.concatenate((slots, np.arange(first, self._untouched, dtype=np.int64)))

    def _drop(self, runs: Runs) -> None:
        places = np.searchsorted(self._gfns, expand(runs))
        self._free = np.concatenate((self._free, self._slots[places]))
        self._gfns, self._slots = np.delete(self._gfns, places), np.delete(self._slots, places)


def _rows(slots: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Give the index of these slots: a slice if they follow each other, which is read where it is and not copied."""
    if slots.size and slots[-1] - slots[0] == slots.size - 1 and (slots[1:] > slots[:-1]).all():
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return slots
