from __future__ import annotations

import pytest

from migrate.ownership import Verdict
from tests.sim.runner import run_seed
from tests.sim.world import Outcome, TheoremBroken

# Fixed, so that a change that breaks one says which; `python -m tests.sim` goes on from there.
SEEDS = 100
BLOCK = 10


def run_seeds(seeds: range) -> list[Outcome]:
    return [run_seed(seed) for seed in seeds]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_no_seed_makes_two_guests_or_loses_one(first: int) -> None:
    outcomes = run_seeds(range(first, first + BLOCK))
    assert sum(outcome.complete for outcome in outcomes) > 0
    assert sum(outcome.rolled_back for outcome in outcomes) > 0
    assert sum(outcome.outages for outcome in outcomes) > 0


def test_a_seed_is_the_same_every_time() -> None:
    assert run_seed(7).story == run_seed(7).story


@pytest.mark.slow
def test_the_simulator_would_notice_a_source_that_goes_back_on_a_lost_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def believe_in_timeouts(*arguments: object) -> Verdict:
        return Verdict.SOURCE

    monkeypatch.setattr("migrate.source.settle", believe_in_timeouts)
    with pytest.raises(TheoremBroken, match=r"runs on .* and .*"):
        run_seeds(range(SEEDS))
