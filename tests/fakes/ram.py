"""A guest's RAM that is an array of this process, with holes: for tests without an operating system."""

from __future__ import annotations

import numpy as np

from memory.errors import OutOfRam
from memory.layout import PAGE_BYTES
from memory.runs import Runs, expand, pages_in, runs_of_mask

__all__ = ["BytesRam"]


class BytesRam:
    """A migrate.ports.GuestRam.

    Args:
        limit_pages: how many pages the host gives before scatter raises OutOfRam; None: all.
    """

    def __init__(self, total_pages: int, *, limit_pages: int | None = None) -> None:
        self._pages = np.zeros((total_pages, PAGE_BYTES), dtype=np.uint8)
        self._present = np.zeros(total_pages, dtype=np.bool_)
        self._limit_pages = total_pages if limit_pages is None else limit_pages
        self.is_closed = False

    @property
    def total_pages(self) -> int:
        return len(self._pages)

    @property
    def contents(self) -> bytes:
        """All of it."""
        return self._pages.tobytes()

    def write(self, gfn: int, page: bytes) -> None:
        """Write one page as the guest does."""
        self._pages[gfn] = np.frombuffer(page, dtype=np.uint8)
        self._present[gfn] = True

    def populated_runs(self) -> Runs:
        return runs_of_mask(self._present)

    def gather(self, runs: Runs, out: memoryview) -> int:
        picked = self._pages[expand(runs)]
        out.cast("B")[: picked.nbytes] = picked.tobytes()
        return picked.nbytes

    def scatter(self, runs: Runs, pages: memoryview) -> None:
        gfns = expand(runs)
        if pages.nbytes != pages_in(runs) * PAGE_BYTES:
            raise ValueError(f"{pages.nbytes} bytes are not {pages_in(runs)} pages")
        new = int(np.count_nonzero(~self._present[gfns]))
        if new + int(np.count_nonzero(self._present)) > self._limit_pages:
            raise OutOfRam(first_gfn=int(runs[0, 0]), wanted_bytes=pages.nbytes)
        self._pages[gfns] = np.frombuffer(pages, dtype=np.uint8).reshape(-1, PAGE_BYTES)
        self._present[gfns] = True

    def scatter_zeros(self, runs: Runs) -> None:
        gfns = expand(runs)
        self._pages[gfns] = 0
        self._present[gfns] = False

    def close(self) -> None:
        self.is_closed = True
