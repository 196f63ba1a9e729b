"""Buffers that come back and never pile up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from transport import limits
from transport.buffers import BufferPool, capacity_for


@settings(deadline=None)
@given(st.integers(1, limits.MAX_RECORD_BYTES))
def test_a_size_class_holds_what_is_wanted_and_wastes_an_eighth_at_most(wanted: int) -> None:
    capacity = capacity_for(wanted)
    assert wanted <= capacity <= max(4096, wanted + wanted // 8 + 4096)
    assert capacity_for(capacity) == capacity


def test_a_buffer_that_was_given_back_is_lent_again() -> None:
    pool = BufferPool(1 << 20)
    first = pool.lend(10_000)
    pool.give_back(first)
    assert pool.lend(9_999) is first


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 100_000) | st.none(), max_size=80))
def test_free_and_lent_together_pass_the_limit_only_by_what_is_lent(steps: list[int | None]) -> None:
    limit = 200_000
    pool = BufferPool(limit)
    lent: list[bytearray] = []
    for step in steps:
        if step is not None:
            lent.append(pool.lend(step))
        elif lent:
            pool.give_back(lent.pop(0))
        assert pool.total_bytes <= max(limit, sum(map(len, lent)))
