from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.bitmap import DirtyBitmap
from memory.runs import Runs
from tests.memory.strategies import TOTAL_PAGES, mask_of, run, runs


@given(st.lists(runs, max_size=4))
@settings(deadline=None, max_examples=40)
def test_a_bitmap_is_the_union_of_what_was_marked(marked: list[Runs]) -> None:
    bitmap = DirtyBitmap(TOTAL_PAGES)
    expected = np.zeros(TOTAL_PAGES, dtype=np.bool_)
    for rows in marked:
        bitmap.mark(rows)
        expected |= mask_of(rows)
    assert bitmap.count == expected.sum()
    assert (mask_of(bitmap.runs()) == expected).all()
    assert (mask_of(bitmap.take_runs()) == expected).all()
    assert bitmap.count == 0
    assert len(bitmap.take_runs()) == 0


@given(runs, runs)
@settings(deadline=None, max_examples=40)
def test_merging_adds_and_leaves_the_other_alone(a: Runs, b: Runs) -> None:
    one, other = DirtyBitmap(TOTAL_PAGES), DirtyBitmap(TOTAL_PAGES)
    one.mark(a)
    other.mark(b)
    one.merge(other)
    assert (mask_of(one.runs()) == (mask_of(a) | mask_of(b))).all()
    assert (mask_of(other.runs()) == mask_of(b)).all()


def test_a_copy_goes_its_own_way() -> None:
    bitmap = DirtyBitmap(8)
    bitmap.mark_all()
    twin = bitmap.copy()
    bitmap.clear()
    assert (twin.count, bitmap.count, twin.total_pages) == (8, 0, 8)


def test_the_last_page_can_be_marked_and_the_one_after_it_cannot() -> None:
    bitmap = DirtyBitmap(8)
    bitmap.mark(run((7, 1)))
    with pytest.raises(ValueError, match="page 9 of 8"):
        bitmap.mark(run((7, 2)))
    assert bitmap.count == 1


def test_bitmaps_of_different_guests_do_not_merge() -> None:
    with pytest.raises(ValueError, match="do not merge"):
        DirtyBitmap(8).merge(DirtyBitmap(9))
