"""The handover keeps its promises in every state; without any one of its rules it does not."""

import pytest

from tests.model.handover import NEEDS, RULES, Bounds, Result, explore


def told(seen: Result) -> str:
    return "\n".join((str(seen.violation), *seen.trace))


def test_no_state_breaks_an_invariant() -> None:
    seen = explore(bounds=Bounds(max_faults=1))
    assert seen.violation is None, told(seen)


@pytest.mark.slow
def test_no_state_breaks_an_invariant_with_two_crashes() -> None:
    seen = explore(bounds=Bounds(max_faults=2))
    assert seen.violation is None, told(seen)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_needed(rule: str) -> None:
    seen = explore(rule, NEEDS.get(rule, Bounds()))
    assert seen.violation is not None
    assert seen.trace


def test_claims_that_are_recorded_late_and_guests_that_do_not_start_lose_nothing() -> None:
    seen = explore(bounds=Bounds(max_faults=0, late_claims=True, may_not_start=True))
    assert seen.violation is None, told(seen)


@pytest.mark.slow
def test_they_lose_nothing_with_a_crash_either() -> None:
    seen = explore(bounds=Bounds(max_faults=1, late_claims=True, may_not_start=True))
    assert seen.violation is None, told(seen)
