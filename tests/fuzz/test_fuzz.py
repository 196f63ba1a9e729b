"""Every target holds its law for its seeds, and for inputs that are a few mutations away; no atheris needed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.past import PAST
from tests.fuzz.plain import mutated, run_plain
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

RUNS = 60


@pytest.mark.parametrize("name", TARGETS)
def test_the_law_holds_for_seeds_and_for_what_is_near_them(name: str) -> None:
    target, rng = TARGETS[name], random.Random(name)
    seeds = target.seeds()
    for seed in (b"", *seeds):
        target.check(seed)
    for _ in range(RUNS):
        target.check(mutated(rng.choice(seeds), rng)[: target.most_input_bytes])


@pytest.mark.parametrize("name", PAST)
def test_what_was_found_once_is_found_no_more(name: str) -> None:
    for data in PAST[name]:
        TARGETS[name].check(data)


def test_a_finding_is_written_to_a_file_that_replays_it(tmp_path: Path) -> None:
    def fuzz(data: bytes) -> None:
        if len(data) > 3:
            raise KeyError(data)

    bad = Target(name="bad", law="short", fuzz=fuzz, allowed=(), seeds=lambda: (b"abc",))
    figures = run_plain(bad, tmp_path, runs=1000, seed=1)
    (finding,) = figures.findings
    with pytest.raises(KeyError):
        bad.check(finding.read_bytes())
    assert figures.executions < 1000


def test_a_target_that_keeps_its_law_takes_all_runs(tmp_path: Path) -> None:
    figures = run_plain(TARGETS["quantity"], tmp_path, runs=20, seed=1)
    assert (figures.executions, figures.findings) == (20, ())
