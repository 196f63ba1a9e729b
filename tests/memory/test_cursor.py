from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.cursor import RunCursor
from memory.runs import Runs, check_runs, empty_runs, expand, pages_in
from tests.memory.strategies import TOTAL_PAGES, run, runs


@given(runs, st.lists(st.integers(1, 70), min_size=1), st.integers(1, 70))
@settings(deadline=None, max_examples=40)
def test_pieces_are_full_in_order_and_together_everything(rows: Runs, sizes: list[int], limit: int) -> None:
    cursor = RunCursor(rows, limit)
    left = pages_in(rows)
    taken = [np.empty(0, dtype=np.int64)]
    turn = 0
    while True:
        assert cursor.remaining_pages == left
        wanted = sizes[turn % len(sizes)]
        piece = cursor.take(wanted)
        check_runs(piece, TOTAL_PAGES)
        assert pages_in(piece) == min(wanted, limit, left)
        if len(piece) == 0:
            break
        left -= pages_in(piece)
        taken.append(expand(piece))
        turn += 1
    assert np.concatenate(taken).tolist() == expand(rows).tolist()


def test_pieces_do_not_change_the_runs_they_came_from() -> None:
    rows = run((0, 10), (20, 10))
    before = rows.copy()
    piece = RunCursor(rows, 4).take()
    piece[:] = -1
    assert (rows == before).all()


def test_without_limits_one_piece_is_everything() -> None:
    cursor = RunCursor(run((0, 10), (20, 10)))
    assert cursor.take().tolist() == [[0, 10], [20, 10]]
    assert len(cursor.take()) == 0
    assert len(RunCursor(empty_runs()).take()) == 0


def test_many_threads_take_every_page_once() -> None:
    cursor = RunCursor(run((0, 5000), (6000, 5000)), 3)
    taken: list[list[int]] = [[] for _ in range(4)]
    go = threading.Barrier(4)

    def work(gfns: list[int]) -> None:
        go.wait()
        while len(piece := cursor.take()):
            gfns.extend(expand(piece).tolist())

    threads = [threading.Thread(target=work, args=(gfns,)) for gfns in taken]
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places within a take, too
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual_s)
    assert sorted(gfn for gfns in taken for gfn in gfns) == [*range(5000), *range(6000, 11000)]
    assert cursor.remaining_pages == 0


@pytest.mark.parametrize("pages", [0, -1])
def test_a_piece_of_no_pages_is_our_mistake(pages: int) -> None:
    with pytest.raises(ValueError, match="at least 1 page"):
        RunCursor(empty_runs(), pages)
    with pytest.raises(ValueError, match="at least 1 page"):
        RunCursor(empty_runs()).take(pages)
