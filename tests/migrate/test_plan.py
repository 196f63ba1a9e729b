from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.plan import (
    FEW_PAGES,
    MAX_CATCH_UPS,
    STALLED_ROUNDS,
    Next,
    OnTimeout,
    Policy,
    catches_up,
    decide,
    has_much_left,
    predicted_downtime_s,
)
from migrate.stats import RoundStats

FIXED_S = 0.01


def a_round(
    dirty_pages: int, *, rate: float = 1000.0, goodput: float = 409.6e6, duration_s: float = 0.01
) -> RoundStats:
    """100 000 pages a second of goodput: 1000 dirty pages cost 10 ms, and so did the 1000 that it sent."""
    return RoundStats(
        number=0,
        duration_s=duration_s,
        sent_pages=1000,
        wire_bytes=1,
        dirty_pages=dirty_pages,
        dirty_rate_pages_per_s=rate,
        goodput_bytes_per_s=goodput,
    )


def test_prediction_is_the_fixed_part_and_the_last_pages() -> None:
    assert predicted_downtime_s(a_round(1000), FIXED_S) == FIXED_S + 0.01
    assert predicted_downtime_s(a_round(0, goodput=0.0), FIXED_S) == FIXED_S


def test_a_clean_guest_is_switched_over_at_once() -> None:
    assert decide([a_round(0)], Policy(), FIXED_S).next is Next.SWITCH_OVER


def test_another_round_is_made_while_it_shrinks_the_rest_even_within_the_limit() -> None:
    decision = decide([a_round(10_000, rate=1000.0)], Policy(downtime_limit_s=1.0), FIXED_S)
    assert decision.next is Next.AGAIN
    assert "would leave about 100 of 10000" in decision.because


def test_a_round_whose_overhead_lets_the_guest_write_as_much_again_is_not_made() -> None:
    # 100 pages take 1.2 ms, and each round 2 ms more: at 31 000 pages/s that leaves 99 of them.
    rounds = [
        a_round(5000, rate=31_000.0, goodput=341e6, duration_s=0.5),
        a_round(100, rate=31_000.0, goodput=341e6, duration_s=0.014),
    ]
    decision = decide(rounds, Policy(), FIXED_S)
    assert decision.next is Next.SWITCH_OVER
    assert "would not make it much shorter" in decision.because
    # The first round, which scans all RAM, tells nothing of the overhead of the others.
    assert decide(rounds[:1], Policy(downtime_limit_s=1.0), FIXED_S).next is Next.AGAIN


def test_one_quick_round_does_not_make_others_that_are_not() -> None:
    # Rounds of some 70 pages take 4.6 ms, 2.5 of them beside the pages; one was done at once.
    quick = a_round(80, rate=15_000.0, goodput=136e6, duration_s=0.03)
    usual = a_round(74, rate=15_000.0, goodput=136e6, duration_s=0.0325)
    rounds = [a_round(5000), quick, usual, usual]
    assert "would not make it much shorter" in decide(rounds, Policy(), FIXED_S).because
    assert decide([a_round(5000), quick, quick, usual], Policy(), FIXED_S).next is Next.AGAIN


def test_exactly_on_the_budget_is_within_it_and_a_page_more_is_not() -> None:
    fast_writer = 90_000.0  # a round would leave 0.9 of the pages: not worth it
    policy = Policy(downtime_limit_s=0.11)
    assert decide([a_round(10_000, rate=fast_writer)], policy, FIXED_S).next is Next.SWITCH_OVER
    decision = decide([a_round(10_001, rate=fast_writer)], policy, FIXED_S)
    assert decision.next is Next.AGAIN
    assert "over 110 ms" in decision.because


def test_rounds_without_a_new_minimum_end_in_what_the_policy_says() -> None:
    rounds = [a_round(50_000, rate=200_000.0)] + [a_round(60_000, rate=200_000.0)] * STALLED_ROUNDS
    assert decide(rounds[:-1], Policy(), FIXED_S).next is Next.AGAIN
    stalled = decide(rounds, Policy(), FIXED_S)
    assert stalled.next is Next.ABORT
    assert "the guest writes 819 MB/s and the link moves 410 MB/s" in stalled.because
    assert decide(rounds, Policy(on_timeout=OnTimeout.SUSPEND), FIXED_S).next is Next.SUSPEND


def test_stalled_rounds_within_the_limit_switch_over() -> None:
    rounds = [a_round(1000, rate=60_000.0)] + [a_round(2000, rate=60_000.0)] * STALLED_ROUNDS
    assert decide(rounds, Policy(downtime_limit_s=0.3), FIXED_S).next is Next.SWITCH_OVER


def test_no_goodput_never_looks_fast() -> None:
    decision = decide([a_round(10, goodput=0.0)], Policy(), FIXED_S)
    assert decision.next is Next.AGAIN
    assert decision.predicted_downtime_s == float("inf")


@given(
    st.lists(
        st.builds(
            a_round,
            st.integers(0, 10**7),
            rate=st.floats(0, 1e7),
            goodput=st.floats(0, 1e11),
        ),
        min_size=1,
        max_size=40,
    ),
    st.floats(0, 10),
)
@settings(deadline=None, max_examples=200)
def test_a_switch_over_is_never_predicted_to_exceed_the_limit(
    rounds: list[RoundStats], limit_s: float
) -> None:
    decision = decide(rounds, Policy(downtime_limit_s=limit_s), FIXED_S)
    if decision.next is Next.SWITCH_OVER:
        assert decision.predicted_downtime_s <= limit_s
    assert decision.because


def test_a_stop_that_would_copy_for_long_is_worth_rounds_after_the_decision() -> None:
    for dirty_pages, is_much in ((900, False), (1100, True)):
        decision = decide([a_round(dirty_pages, rate=200_000.0)], Policy(), FIXED_S)
        assert decision.next is Next.SWITCH_OVER
        assert has_much_left(decision, FIXED_S) is is_much


def test_a_guest_is_caught_up_with_while_that_leaves_clearly_less_and_more_than_a_few_pages() -> None:
    assert catches_up(1, 1000, 799)
    assert not catches_up(1, 1000, 800)
    assert not catches_up(1, 1000, FEW_PAGES)
    assert catches_up(1, 1000, FEW_PAGES + 1)
    assert not catches_up(1, 0, 0)
    assert not catches_up(MAX_CATCH_UPS, 1000, 500)
