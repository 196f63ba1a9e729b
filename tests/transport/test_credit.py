"""How fast and how often, in numbers of a clock that the tests own."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.credit import Backoff, TokenBucket
from transport.errors import LocalMisuse


def test_a_burst_goes_at_once_and_the_byte_after_it_waits() -> None:
    bucket = TokenBucket(100.0, 50)
    assert bucket.take(50, 0.0) == 0.0
    assert bucket.take(1, 0.0) == pytest.approx(0.01)


def test_a_record_larger_than_the_burst_passes_after_its_wait() -> None:
    bucket = TokenBucket(100.0, 10)
    assert bucket.take(110, 5.0) == pytest.approx(1.0)
    assert bucket.take(10, 6.0) == pytest.approx(0.1)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 3)), min_size=1, max_size=40))
def test_over_any_time_no_more_than_burst_and_rate_may_go(takes: list[tuple[int, float]]) -> None:
    bucket = TokenBucket(100.0, 50)
    now_s, sent_bytes = 0.0, 0
    for size, pause_s in takes:
        now_s += pause_s
        may_go_at_s = now_s + bucket.take(size, now_s)
        sent_bytes += size
        assert sent_bytes <= 50 + 100.0 * may_go_at_s + 1e-6


def test_without_a_rate_nothing_waits_and_a_rate_that_comes_begins_with_a_burst() -> None:
    bucket = TokenBucket(None, 50)
    assert bucket.take(10**9, 0.0) == 0.0
    bucket.set_rate(100.0, 1.0)
    assert bucket.take(50, 1.0) == 0.0
    assert bucket.take(100, 1.0) == pytest.approx(1.0)


def test_held_takes_nothing_and_says_forever() -> None:
    bucket = TokenBucket(0, 50)
    assert bucket.take(10, 0.0) == math.inf
    bucket.set_rate(100.0, 7.0)
    assert bucket.take(10, 8.0) == 0.0


def test_what_is_given_back_can_be_taken_again() -> None:
    bucket = TokenBucket(100.0, 50)
    bucket.take(50, 0.0)
    bucket.take(100, 0.0)
    bucket.give_back(100, 0.0)
    assert bucket.take(1, 0.0) == pytest.approx(0.01)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(100.0, 50)
    bucket.take(50, 10.0)
    assert bucket.take(10, 5.0) == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_what_is_no_rate_is_a_bug_of_the_caller(rate: float) -> None:
    with pytest.raises(LocalMisuse):
        TokenBucket(rate, 50)
    with pytest.raises(LocalMisuse):
        TokenBucket(None, 50).set_rate(rate, 0.0)
    with pytest.raises(LocalMisuse):
        TokenBucket(1.0, 0)


def test_delays_double_up_to_their_limit_with_jitter_and_begin_again() -> None:
    backoff = Backoff(1.0, 5.0, random.Random(7))
    for whole_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert whole_s / 2 <= backoff.next_s() <= whole_s
    backoff.reset()
    assert backoff.next_s() <= 1.0


@pytest.mark.parametrize(("initial_s", "max_s"), [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_what_is_no_back_off_is_a_bug_of_the_caller(initial_s: float, max_s: float) -> None:
    with pytest.raises(LocalMisuse):
        Backoff(initial_s, max_s, random.Random(1))
