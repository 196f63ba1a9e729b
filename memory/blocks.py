"""A guest's RAM in several files, as one: a block each, in order of gfn.

Law: passes on what it is asked to the blocks' own RAMs and does nothing else. Runs are sorted, so the pages of one
block are one stretch of every buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from memory.layout import PAGE_BYTES
from memory.ram import MappedRam
from memory.runs import Runs, clip, empty_runs, end_of, pages_in

__all__ = ["BlockRam"]


class BlockRam:
    """`migrate.ports.GuestRam` over blocks that follow each other; it owns and closes them.

    Threads may read and write at once as long as they write to different pages.
    """

    def __init__(self, blocks: Sequence[MappedRam]) -> None:
        self._blocks: list[tuple[int, MappedRam]] = []
        first_gfn = 0
        for block in blocks:
            self._blocks.append((first_gfn, block))
            first_gfn += block.total_pages
        self._total_pages = first_gfn

    @property
    def total_pages(self) -> int:
        return self._total_pages

    def populated_runs(self) -> Runs:
        """Ask the file systems for the pages that may differ from zero."""
        return self._joined(block.populated_runs() for _, block in self._blocks)

    def holes_among(self, runs: Runs) -> Runs:
        """Give the pages of `runs` that are holes now."""
        return self._joined(block.holes_among(part) for block, part in self._parts(runs))

    def gather(self, runs: Runs, out: memoryview) -> int:
        """Copy the pages of `runs`, in order, to the start of `out`; give the number of bytes."""
        octets, at = out.cast("B"), 0
        for block, part in self._parts(runs):
            if len(part):
                at += block.gather(part, octets[at:])
        return at

    def scatter(self, runs: Runs, pages: memoryview) -> None:
        """Write `pages` to `runs`, in order."""
        octets, at = pages.cast("B"), 0
        if octets.nbytes != pages_in(runs) * PAGE_BYTES:
            raise ValueError(f"{octets.nbytes} bytes are not {pages_in(runs)} pages")
        for block, part in self._parts(runs):
            if len(part):
                size_bytes = pages_in(part) * PAGE_BYTES
                block.scatter(part, octets[at : at + size_bytes])
                at += size_bytes

    def scatter_zeros(self, runs: Runs) -> None:
        """Make every page of `runs` a hole."""
        for block, part in self._parts(runs):
            block.scatter_zeros(part)

    def close(self) -> None:
        """Let go of all blocks. May be called twice."""
        for _, block in self._blocks:
            block.close()

    def _parts(self, runs: Runs) -> Iterator[tuple[MappedRam, Runs]]:
        """Give each block's part of `runs`, counted from the block's own start; a part for every block."""
        if len(runs) and (int(runs[0, 0]) < 0 or end_of(runs) > self._total_pages):
            raise ValueError(f"runs leave the guest's {self._total_pages} pages")
        if len(self._blocks) == 1:
            yield self._blocks[0][1], runs
            return
        for first_gfn, block in self._blocks:
            part = clip(runs, first_gfn, first_gfn + block.total_pages)
            if len(part):
                part = part - np.array([first_gfn, 0], dtype=np.int64)
            yield block, part

    def _joined(self, parts: Iterator[Runs]) -> Runs:
        moved = [
            part + np.array([first_gfn, 0], dtype=np.int64)
            for (first_gfn, _), part in zip(self._blocks, parts, strict=True)
        ]
        return np.concatenate(moved) if moved else empty_runs()
