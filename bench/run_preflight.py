"""Does the preflight find every problem, and nothing where there is none?

The matrix of `tests/preflight`: problems that are provoked between two real agents, each with the ids that it must be
refused with, and good combinations that nothing may be said against. A table of it goes to stderr; `problems_missed`
and `false_refusals` are 0 or it is a bug. Each preflight is timed, with the agents of both hosts in one process.
"""

from __future__ import annotations

import functools
import logging
import statistics
import sys
from typing import Final

import anyio
import pytest

from tests.agents.host.fleet import scratch_folder
from tests.needs import NotHere
from tests.preflight.cases import Case, Outcome
from tests.preflight.matrix import all_cases
from tests.preflight.stage import Build

QUESTION: Final = "Does the preflight find every problem, and nothing where there is none?"

SMOKE_CASES: Final = 3
GOAL_S: Final = 2.0


def run(smoke: bool) -> dict[str, object]:
    """Give how many problems were found, and how many good combinations were refused."""
    # Agents of this very process refuse what they are asked: what they log about it is not the answer.
    logging.getLogger("agents").addHandler(logging.NullHandler())
    cases = all_cases()[: SMOKE_CASES if smoke else None]
    tried: dict[bool, int] = {True: 0, False: 0}
    mistakes: dict[bool, int] = {True: 0, False: 0}
    not_here = 0
    times_s: list[float] = []
    for case in cases:
        try:
            outcome, took_s = _play(case)
        except (NotHere, pytest.skip.Exception) as exc:
            not_here += 1
            _show(case, f"not played: {exc}")
            continue
        except Exception as exc:
            # One case that breaks must not hide what the others say.
            tried[case.is_problem] += 1
            mistakes[case.is_problem] += 1
            _show(case, f"MISTAKE: it ended in an error: {exc!r:.200}")
            continue
        mistake = outcome.mistake(case)
        tried[case.is_problem] += 1
        mistakes[case.is_problem] += bool(mistake)
        times_s.append(took_s)
        _show(case, f"MISTAKE: {mistake}" if mistake else f"as it must be, in {took_s:.2f} s")
    return {
        "problems": tried[True],
        "problems_missed": mistakes[True],
        "good_combinations": tried[False],
        "false_refusals": mistakes[False],
        "not_played": not_here,
        "preflight_s": statistics.median(times_s),
        "slowest_preflight_s": max(times_s),
        "slowest_preflight_of_goal_ratio": max(times_s) / GOAL_S,
    }


def _play(case: Case) -> tuple[Outcome, float]:
    with scratch_folder() as folder:
        build = Build(folder)
        report = anyio.run(functools.partial(case.play, build))
        return Outcome.of(report), build.check_s


def _show(case: Case, words: str) -> None:
    ids = ", ".join(sorted(case.expected)) or "nothing"
    severity = case.severity if case.expected else ""
    print(f"{case.area:10} {case.name:60} {severity:8} {ids:40} {words}", file=sys.stderr, flush=True)
