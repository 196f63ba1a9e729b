"""The handover keeps its promises in every state; without any one of its rules it does not."""

import pytest

from tests.model.handover import RULES, Bounds, Result, explore


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
    seen = explore(rule)
    assert seen.violation is not None
    assert seen.trace


@pytest.mark.xfail(strict=True, reason="a destination ends its machine on a record that may still change")
def test_a_claim_that_is_recorded_late_loses_no_guest() -> None:
    seen = explore(bounds=Bounds(max_faults=0, late_claims=True))
    assert seen.violation is None, told(seen)


def test_a_destination_that_takes_the_record_before_it_gives_up_loses_no_guest() -> None:
    seen = explore(bounds=Bounds(max_faults=0, late_claims=True, fences=True))
    assert seen.violation is None, told(seen)


@pytest.mark.xfail(strict=True, reason="a source in doubt ends its copy before the destination's has started")
def test_a_guest_that_does_not_start_after_the_source_gave_way_is_not_lost() -> None:
    seen = explore(bounds=Bounds(max_faults=0, may_not_start=True))
    assert seen.violation is None, told(seen)
