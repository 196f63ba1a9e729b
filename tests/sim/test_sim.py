from __future__ import annotations

from collections.abc import Iterable

import pytest

from migrate.ownership import Ownership, Verdict, verdict_for_source
from tests.sim.faults import Outcome, TheoremBroken
from tests.sim.runner import run_seed

# Fixed, so that a change that breaks one says which; `python -m tests.sim` goes on from there.
SEEDS = 100
BLOCK = 10
# At once, or one after the other: then the second has not what the first has written.
DOUBLED = r"runs on .* and .*|with RAM that is not its own"
# Of three seeds the second has agents that die and nothing else.
DYING = range(1, 10, 3)
# Where a source dies after its COMMIT was obeyed and before it has ended its copy.
AT_COMMIT = (16, 19)
# Where a destination has claimed a guest that does not start there.
GIVEN_BACK = (382, 487)


def run_seeds(seeds: Iterable[int]) -> list[Outcome]:
    return [run_seed(seed) for seed in seeds]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_no_seed_makes_two_guests_or_loses_one(first: int) -> None:
    outcomes = run_seeds(range(first, first + BLOCK))
    assert sum(outcome.complete for outcome in outcomes) > 0
    assert sum(outcome.rolled_back for outcome in outcomes) > 0
    assert sum(outcome.outages for outcome in outcomes) > 0
    assert sum(outcome.crashes for outcome in outcomes) > 0


def test_agents_that_die_all_the_time_lose_no_guest() -> None:
    outcomes = run_seeds(DYING)
    assert sum(outcome.crashes_at_steps for outcome in outcomes) > 0
    assert sum(outcome.taken_up for outcome in outcomes) > 0
    assert sum(outcome.gone_on for outcome in outcomes) > 0
    assert sum(outcome.complete for outcome in outcomes) > 0


@pytest.mark.parametrize("seed", [7, 8])
def test_a_seed_is_the_same_every_time(seed: int) -> None:
    assert run_seed(seed).story == run_seed(seed).story


@pytest.mark.slow
def test_the_simulator_would_notice_a_source_that_goes_back_on_a_lost_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("migrate.source.settle", believe_in_timeouts)
    with pytest.raises(TheoremBroken, match=DOUBLED):
        run_seeds(range(SEEDS))


def test_the_simulator_would_notice_a_restart_that_resumes_its_guest_without_asking_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agents.host.recovery.settle", believe_in_timeouts)
    with pytest.raises(TheoremBroken, match=DOUBLED):
        run_seeds([*AT_COMMIT, *range(1, 60, 3)])


@pytest.mark.slow
def test_the_simulator_would_notice_a_source_that_ends_its_copy_before_the_destination_says_that_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("migrate.doubt.verdict_for_source", believe_in_claims)
    with pytest.raises(TheoremBroken, match=r"did not come to rest|not settled"):
        run_seeds([*GIVEN_BACK, *range(1, 60, 3)])


def believe_in_claims(latest: Ownership | None, claim: Ownership) -> Verdict:
    verdict = verdict_for_source(latest, claim)
    return Verdict.DESTINATION if verdict is Verdict.TAKEN else verdict


async def believe_in_timeouts(*arguments: object) -> Verdict:
    return Verdict.SOURCE
