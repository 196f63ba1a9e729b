"""Runs of pages: the unit of copying, as arrays and never as objects.

Law: pure numpy on whole arrays, no loop over pages (`fill` says where it loops). Runs are rows of
[first gfn, pages] in one int64 array of shape (n, 2): sorted by gfn, none empty, none overlapping. Rows may
touch. Every function here takes and gives such arrays; what a peer sent becomes one only through `check_runs`.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from memory.errors import CodecError

__all__ = [
    "Gfns",
    "Mask",
    "Runs",
    "check_runs",
    "clip",
    "clip_pages",
    "complement",
    "cut",
    "empty_runs",
    "end_of",
    "expand",
    "fill",
    "intersect",
    "pages_in",
    "runs_of_gfns",
    "runs_of_mask",
    "subtract",
    "union",
    "whole",
]

Runs = NDArray[np.int64]
Gfns = NDArray[np.int64]
Mask = NDArray[np.bool_]
_Entry = TypeVar("_Entry", np.bool_, np.uint64)

_SLICED_PAGES = 256
_INDEXED_ROWS = 4096
# A batch of a guest that is copied for the first time is one run or a few, and is looked at a dozen times. Of one run
# `pages_in` takes 0.4 µs so and 1.4 by numpy, `expand` 1.4 and 7.2, `fill` 0.9 and 4.5 (2 vCPUs).
_FEW_ROWS = 8


def empty_runs() -> Runs:
    """Give the array of no runs."""
    return np.empty((0, 2), dtype=np.int64)


def whole(total_pages: int) -> Runs:
    """Give one run over pages 0 to `total_pages`, or none when that is 0."""
    return empty_runs() if total_pages == 0 else np.array([[0, total_pages]], dtype=np.int64)


def pages_in(runs: Runs) -> int:
    """Count the pages of `runs`."""
    if len(runs) <= _FEW_ROWS:
        return sum(runs[:, 1].tolist())
    return int(runs[:, 1].sum())


def end_of(runs: Runs) -> int:
    """Give the gfn after the last one; 0 of no runs."""
    return int(runs[-1, 0]) + int(runs[-1, 1]) if len(runs) else 0


def runs_of_mask(mask: Mask, base: int = 0) -> Runs:
    """Give the longest runs of True in `mask`, whose entry 0 stands for gfn `base`."""
    if mask.size == 0:
        return empty_runs()
    flips = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    bounds = np.concatenate(([0], flips, [mask.size]))
    # Stretches of equal entries alternate, so every second one is True.
    first = 0 if mask[0] else 1
    starts, ends = bounds[first:-1:2], bounds[first + 1 :: 2]
    return np.column_stack((starts + base, ends - starts)).astype(np.int64, copy=False)


def runs_of_gfns(gfns: Gfns) -> Runs:
    """Give the longest runs of `gfns`, which are sorted and distinct."""
    if gfns.size == 0:
        return empty_runs()
    breaks = np.flatnonzero(np.diff(gfns) != 1) + 1
    bounds = np.concatenate(([0], breaks, [gfns.size]))
    return np.column_stack((gfns[bounds[:-1]], np.diff(bounds))).astype(np.int64, copy=False)


def expand(runs: Runs) -> Gfns:
    """Give the gfn of every page of `runs`, in order: 8 bytes a page, so for batches, not for whole guests."""
    if len(runs) == 1:
        return np.arange(runs[0, 0], end_of(runs), dtype=np.int64)
    pages = runs[:, 1]
    before = np.cumsum(pages) - pages
    return np.repeat(runs[:, 0] - before, pages) + np.arange(pages_in(runs), dtype=np.int64)


def fill(table: NDArray[_Entry], runs: Runs, value: _Entry | bool) -> None:
    """Set the entries of `runs` in a table that has one entry a page.

    1 Mi pages, half of them in runs of 4 / 64 / 1024: index arrays 1.6 / 0.9 / 0.9 ms, slices 63 / 2.5 / 0.2 ms
    (2 vCPUs). So runs of 1 MiB and more are slices, and the others go by index in steps of 8 MiB of index at most.
    """
    long, short = runs, runs[:0]
    if len(runs) > _FEW_ROWS:
        is_long = runs[:, 1] >= _SLICED_PAGES
        long, short = runs[is_long], runs[~is_long]
    for first, pages in long.tolist():
        table[first : first + pages] = value
    for row in range(0, len(short), _INDEXED_ROWS):
        table[expand(short[row : row + _INDEXED_ROWS])] = value


def intersect(a: Runs, b: Runs) -> Runs:
    """Give the pages that are in both. Never longer than the rows of `a` and `b` together."""
    if len(a) == 0 or len(b) == 0:
        return empty_runs()
    a_end, b_end = a.sum(axis=1), b.sum(axis=1)
    low = np.searchsorted(b_end, a[:, 0], side="right")
    high = np.searchsorted(b[:, 0], a_end, side="left")
    hits = np.maximum(high - low, 0)
    from_a = np.repeat(np.arange(len(a)), hits)
    from_b = expand(np.column_stack((low, hits)))
    starts = np.maximum(a[from_a, 0], b[from_b, 0])
    ends = np.minimum(a_end[from_a], b_end[from_b])
    return np.column_stack((starts, ends - starts))


def complement(runs: Runs, total_pages: int) -> Runs:
    """Give the pages below `total_pages` that are not in `runs`."""
    starts = np.concatenate(([0], runs.sum(axis=1)))
    ends = np.concatenate((runs[:, 0], [total_pages]))
    gaps = np.column_stack((starts, ends - starts)).astype(np.int64, copy=False)
    return gaps[gaps[:, 1] > 0]


def subtract(a: Runs, b: Runs) -> Runs:
    """Give the pages of `a` that are not in `b`."""
    if len(a) == 0:
        return empty_runs()
    return intersect(a, complement(b, end_of(a)))


def union(a: Runs, b: Runs) -> Runs:
    """Give the pages that are in either, as the longest runs."""
    rows = np.concatenate((a, b))
    if len(rows) == 0:
        return empty_runs()
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    reach = np.maximum.accumulate(rows.sum(axis=1))
    opens = np.concatenate(([True], rows[1:, 0] > reach[:-1]))
    starts = rows[opens, 0]
    ends = reach[np.concatenate((opens[1:], [True]))]
    return np.column_stack((starts, ends - starts))


def clip(runs: Runs, first_gfn: int, end_gfn: int) -> Runs:
    """Give the pages of `runs` from `first_gfn` up to, not with, `end_gfn`."""
    if end_gfn <= first_gfn:
        return empty_runs()
    return intersect(runs, np.array([[first_gfn, end_gfn - first_gfn]], dtype=np.int64))


def clip_pages(runs: Runs, pages: int) -> Runs:
    """Give the first `pages` pages of `runs`, or all of them."""
    ends = np.cumsum(runs[:, 1])
    if len(runs) == 0 or pages >= int(ends[-1]):
        return runs
    return cut(runs, ends, 0, max(pages, 0))


def cut(runs: Runs, ends: NDArray[np.int64], low: int, high: int) -> Runs:
    """Give pages `low` up to, not with, `high` of all the pages of `runs` in order; of `ends`, a binary search.

    Args:
        ends: the cumulated pages of `runs`, of whom there are `high` at least.
    """
    if low == high:
        return empty_runs()
    # In rows `first` to `last`, both cut to fit.
    first = int(np.searchsorted(ends, low, side="right"))
    last = int(np.searchsorted(ends, high, side="left"))
    piece = runs[first : last + 1].copy()
    piece[-1, 1] -= int(ends[last]) - high
    skipped = low - (int(ends[first]) - int(runs[first, 1]))
    piece[0] += (skipped, -skipped)
    return piece


def check_runs(runs: Runs, total_pages: int) -> None:
    """Make sure that rows which a peer sent are runs of a guest of `total_pages` pages.

    Numbers of 2**63 and more, read as int64, are negative here and refused as such.

    Raises:
        CodecError: theirs: a row is empty, past the end, out of order or overlaps the one before it.
    """
    first, pages = runs[:, 0], runs[:, 1]
    # `first > total - pages` and not `first + pages > total`: the sum of hostile numbers can wrap.
    if ((first < 0) | (pages < 1) | (first > total_pages - pages)).any():
        raise CodecError(f"a run is empty or leaves the guest's {total_pages} pages")
    if (first[1:] < first[:-1] + pages[:-1]).any():
        raise CodecError("runs are out of order or overlap")
