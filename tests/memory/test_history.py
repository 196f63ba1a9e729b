"""Copies of what was sent last: what is kept, what gives way, and what has a base."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.history import PageHistory, Pages
from memory.layout import PAGE_BYTES
from memory.runs import Runs, empty_runs, expand, pages_in
from tests.memory.strategies import run, runs

WORDS = PAGE_BYTES // 8


def filled(rows: Runs, salt: int) -> Pages:
    """Give pages of which each says whose it is."""
    return np.repeat((expand(rows) * 1000 + salt).astype(np.uint64), WORDS).reshape(-1, WORDS)


def gfns(rows: Runs) -> set[int]:
    return set(expand(rows).tolist())


def bases_of(history: PageHistory, rows: Runs) -> Pages:
    """The difference to zeros, which are replaced at once."""
    out = np.empty((pages_in(rows), WORDS), dtype=np.uint64)
    history.exchange(rows, np.zeros_like(out), out)
    history.store(rows, out)
    return out


def test_only_what_is_kept_and_was_stored_has_a_base() -> None:
    history = PageHistory(8 * PAGE_BYTES)
    rows = run((2, 2), (9, 1))
    history.store(rows, filled(rows, 1))
    assert [gfns(part) for part in history.split(rows)] == [{2, 3, 9}, set(), set()]
    history.keep(run((3, 1), (9, 1)))
    assert [gfns(part) for part in history.split(rows)] == [{2}, {3, 9}, set()]
    history.store(rows, filled(rows, 2))
    assert [gfns(part) for part in history.split(rows)] == [{2}, set(), {3, 9}]
    assert (bases_of(history, run((3, 1), (9, 1))) == filled(run((3, 1), (9, 1)), 2)).all()
    with pytest.raises(ValueError, match="no base"):
        bases_of(history, rows)


def test_pages_that_are_not_written_again_give_way_and_no_others() -> None:
    history = PageHistory(4 * PAGE_BYTES)
    history.keep(run((0, 4)))
    history.store(run((0, 4)), filled(run((0, 4)), 1))
    history.keep(run((2, 1), (10, 2)))
    assert history.kept_pages == 4
    # 0 and 1 went: two of those that were not named. 2 was, and 3 needed not go.
    assert gfns(history.split(run((0, 12)))[2]) == {2, 3}
    history.keep(run((2, 1), (10, 9)))
    assert gfns(history.split(run((0, 30)))[1]) == {10, 11, 12}
    assert gfns(history.split(run((0, 30)))[2]) == {2}


def test_a_set_that_is_larger_than_the_room_keeps_the_pages_that_it_has() -> None:
    history = PageHistory(4 * PAGE_BYTES)
    for _ in range(3):
        history.keep(run((0, 100)))
        history.store(run((0, 100)), filled(run((0, 100)), 5))
    assert gfns(history.split(run((0, 100)))[2]) == {0, 1, 2, 3}


def test_a_slot_that_changed_hands_has_no_base_of_the_page_before() -> None:
    history = PageHistory(PAGE_BYTES)
    history.keep(run((1, 1)))
    history.store(run((1, 1)), filled(run((1, 1)), 1))
    history.keep(run((2, 1)))
    assert gfns(history.split(run((1, 2)))[2]) == set()


def test_what_is_forgotten_is_stored_again_when_it_is_sent() -> None:
    history = PageHistory(4 * PAGE_BYTES)
    history.keep(run((0, 4)))
    history.store(run((0, 4)), filled(run((0, 4)), 1))
    history.forget(run((1, 2), (50, 3)))
    assert [gfns(part) for part in history.split(run((0, 4)))] == [set(), {1, 2}, {0, 3}]
    history.store(run((1, 2)), filled(run((1, 2)), 2))
    assert (bases_of(history, run((1, 2))) == filled(run((1, 2)), 2)).all()


@pytest.mark.parametrize("max_bytes", [-1, 0, PAGE_BYTES - 1])
def test_a_history_without_room_keeps_nothing(max_bytes: int) -> None:
    history = PageHistory(max_bytes)
    history.keep(run((0, 4)))
    history.store(run((0, 4)), filled(run((0, 4)), 1))
    history.forget(run((0, 4)))
    assert [gfns(part) for part in history.split(run((0, 4)))] == [{0, 1, 2, 3}, set(), set()]


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_memory_is_taken_for_pages_that_are_stored_only() -> None:
    before = rss_bytes()
    history = PageHistory(8 << 30)
    history.keep(run((5, 1)))
    history.store(run((5, 1)), filled(run((5, 1)), 1))
    assert rss_bytes() - before < 16 << 20
    assert (bases_of(history, run((5, 1))) == filled(run((5, 1)), 1)).all()


def test_a_host_that_promises_no_memory_has_a_history_without_room() -> None:
    history = PageHistory(1 << 60)
    history.keep(run((5, 1)))
    assert history.kept_pages == 0


@given(st.integers(0, 120), st.lists(st.tuples(st.sampled_from("ksf"), runs), max_size=12))
@settings(deadline=None, max_examples=60)
def test_a_base_is_what_was_stored_last_whatever_comes_in_between(
    capacity: int, steps: list[tuple[str, Runs]]
) -> None:
    history, stored = PageHistory(capacity * PAGE_BYTES), dict[int, int]()
    for number, (step, rows) in enumerate(steps):
        if step == "k":
            history.keep(rows)
            wanted = gfns(rows)
            assert history.kept_pages <= capacity
            assert len(wanted & gfns(history.split(rows)[0])) == max(len(wanted) - capacity, 0)
        elif step == "s":
            history.store(rows, filled(rows, number))
            stored |= dict.fromkeys(gfns(rows), number)
        else:
            history.forget(rows)
            assert not gfns(history.split(rows)[2])
        everything = run((0, 400))
        cold, hot, based = history.split(everything)
        assert gfns(cold) | gfns(hot) | gfns(based) == set(range(400))
        assert pages_in(cold) + pages_in(hot) + pages_in(based) == 400
        salts = [gfn * 1000 + stored[gfn] for gfn in expand(based).tolist()]
        assert bases_of(history, based)[:, 0].tolist() == salts


def test_threads_that_store_while_others_are_given_room_spoil_no_base() -> None:
    history = PageHistory(64 * PAGE_BYTES)
    history.keep(run((0, 64)))
    ends = threading.Event()

    def store(first: int) -> None:
        rows = run((first, 16))
        while not ends.is_set():
            history.store(rows, filled(rows, 7))

    threads = [threading.Thread(target=store, args=(16 * n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for number in range(300):
        history.keep(run((8 * (number % 8), 64)))
    ends.set()
    for thread in threads:
        thread.join()
    based = history.split(run((0, 200)))[2]
    assert (bases_of(history, based) == filled(based, 7)).all()


def test_no_page_is_no_work() -> None:
    history = PageHistory(PAGE_BYTES)
    history.keep(empty_runs())
    history.store(empty_runs(), filled(empty_runs(), 1))
    assert history.kept_pages == 0
    assert bases_of(history, empty_runs()).shape == (0, WORDS)
