"""Runs and pages drawn by hypothesis, small in draws however large they are in bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from memory.layout import PAGE_BYTES
from memory.runs import Mask, Runs, runs_of_mask

TOTAL_PAGES = 300

masks: st.SearchStrategy[Mask] = st.lists(
    st.tuples(st.integers(0, TOTAL_PAGES - 1), st.integers(1, 90)), max_size=6
).map(lambda stretches: _mask(stretches))
runs: st.SearchStrategy[Runs] = masks.map(lambda mask: runs_of_mask(mask))


def _mask(stretches: list[tuple[int, int]]) -> Mask:
    mask = np.zeros(TOTAL_PAGES, dtype=np.bool_)
    for first, pages in stretches:
        mask[first : first + pages] = True
    return mask


def mask_of(rows: Runs, total_pages: int = TOTAL_PAGES) -> Mask:
    """Give one flag a page, made the slow and obvious way."""
    mask = np.zeros(total_pages, dtype=np.bool_)
    for first, pages in rows.tolist():
        assert pages > 0
        assert not mask[first : first + pages].any()
        mask[first : first + pages] = True
    return mask


def page(fill: int) -> bytes:
    """Give a page that is zero for 0, compressible below 128 and noise from there on."""
    if fill < 128:
        return bytes([fill]) * PAGE_BYTES
    return np.random.default_rng(fill).bytes(PAGE_BYTES)


def run(*rows: tuple[int, int]) -> Runs:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)
