from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memory.errors import CodecError
from memory.runs import (
    Mask,
    Runs,
    check_runs,
    clip,
    complement,
    empty_runs,
    end_of,
    expand,
    fill,
    intersect,
    pages_in,
    runs_of_gfns,
    runs_of_mask,
    subtract,
    union,
    whole,
)
from tests.memory.strategies import TOTAL_PAGES, mask_of, masks, run, runs


@given(masks)
@settings(deadline=None, max_examples=40)
def test_a_mask_comes_back_from_its_runs(mask: Mask) -> None:
    rows = runs_of_mask(mask)
    assert (mask_of(rows) == mask).all()
    check_runs(rows, TOTAL_PAGES)
    assert pages_in(rows) == mask.sum()


@given(masks, st.integers(0, 1 << 40))
@settings(deadline=None, max_examples=40)
def test_the_base_moves_every_run(mask: Mask, base: int) -> None:
    moved = runs_of_mask(mask, base)
    assert moved.dtype == np.int64
    assert (moved[:, 0] - base == runs_of_mask(mask)[:, 0]).all()


@given(masks)
@settings(deadline=None, max_examples=40)
def test_expanding_gives_the_gfns_and_gfns_give_the_runs(mask: Mask) -> None:
    rows = runs_of_mask(mask)
    gfns = expand(rows)
    assert gfns.tolist() == np.flatnonzero(mask).tolist()
    assert (runs_of_gfns(gfns) == rows).all()


@given(runs, runs)
@settings(deadline=None, max_examples=40)
def test_sets_of_runs_are_the_sets_of_their_pages(a: Runs, b: Runs) -> None:
    in_a, in_b = mask_of(a), mask_of(b)
    assert (mask_of(intersect(a, b)) == (in_a & in_b)).all()
    assert (mask_of(subtract(a, b)) == (in_a & ~in_b)).all()
    assert (mask_of(union(a, b)) == (in_a | in_b)).all()
    assert (mask_of(complement(a, TOTAL_PAGES)) == ~in_a).all()
    assert (union(a, b) == runs_of_mask(in_a | in_b)).all()


@given(runs, st.integers(0, TOTAL_PAGES), st.integers(0, TOTAL_PAGES))
@settings(deadline=None, max_examples=40)
def test_clipping_keeps_the_pages_inside(rows: Runs, first: int, end: int) -> None:
    inside = mask_of(rows)
    inside[:first] = False
    inside[end:] = False
    assert (mask_of(clip(rows, first, end)) == inside).all()


def test_runs_that_touch_are_no_overlap() -> None:
    touching = run((0, 2), (2, 3))
    check_runs(touching, 5)
    assert (union(touching, empty_runs()) == [[0, 5]]).all()
    assert expand(touching).tolist() == [0, 1, 2, 3, 4]


def test_filling_long_and_many_short_runs_sets_exactly_their_entries() -> None:
    table = np.zeros(40_000, dtype=np.bool_)
    short = np.column_stack((np.arange(5000) * 4, np.full(5000, 3)))
    rows = np.concatenate((short, run((25_000, 255), (26_000, 256), (27_000, 257))))
    fill(table, rows, True)
    assert (table == mask_of(rows, 40_000)).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 8, 9, 100])
def test_few_runs_and_many_are_counted_and_filled_alike(rows: int) -> None:
    some = np.column_stack((np.arange(rows) * 7, np.arange(rows) % 5 + 1)).astype(np.int64)
    gfns = [gfn for first, pages in some.tolist() for gfn in range(first, first + pages)]
    assert pages_in(some) == len(gfns)
    assert expand(some).tolist() == gfns
    assert end_of(some) == (gfns[-1] + 1 if gfns else 0)
    table = np.zeros(1000, dtype=np.uint64)
    fill(table, some, np.uint64(5))
    assert np.flatnonzero(table).tolist() == gfns


def test_whole_is_every_page_or_no_run() -> None:
    assert whole(3).tolist() == [[0, 3]]
    assert len(whole(0)) == 0


HOSTILE = [
    run((0, 0)),
    run((0, -1)),
    run((-1, 1)),
    run((TOTAL_PAGES, 1)),
    run((0, TOTAL_PAGES + 1)),
    run((5, 1), (4, 1)),
    run((5, 2), (6, 1)),
    run((5, 1), (5, 1)),
    run((2**63 - 1, 2**63 - 1)),
    run((1, 2**63 - 1)),
    run((-(2**63), 1)),
]


@pytest.mark.parametrize("rows", HOSTILE)
def test_rows_that_are_no_runs_are_refused(rows: Runs) -> None:
    with pytest.raises(CodecError):
        check_runs(rows, TOTAL_PAGES)


def test_the_last_page_is_inside() -> None:
    check_runs(run((0, TOTAL_PAGES)), TOTAL_PAGES)
    check_runs(run((TOTAL_PAGES - 1, 1)), TOTAL_PAGES)
    check_runs(empty_runs(), 0)


edges = st.sampled_from([0, 1, 2, TOTAL_PAGES - 1, TOTAL_PAGES, TOTAL_PAGES + 1, 2**63 - 1, -1, -(2**63)])


@given(arrays(np.int64, st.tuples(st.integers(0, 4), st.just(2)), elements=edges))
@settings(deadline=None, max_examples=40)
def test_garbage_either_is_runs_or_raises_only_codec_error(rows: Runs) -> None:
    try:
        check_runs(rows, TOTAL_PAGES)
    except CodecError:
        return
    mask_of(rows)
