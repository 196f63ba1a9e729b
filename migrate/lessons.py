"""What past moves teach: an outcome taken from a report, the correction of a prediction by it, and the scores.

Law: pure. The correction is conformal: how far past moves ended from the modelled median, in units of the modelled
interval, is the distribution of how far the next one will. It is learned against what the model said and never against
what was corrected already, so that a lesson counts once. Few lessons count little: the model's own interval is worth
PRIOR_MOVES of them.

Source: Lei et al., Distribution-Free Predictive Inference for Regression (JASA 2018), 5.2: locally weighted residuals.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from memory.layout import PAGE_BYTES
from migrate.forecast import (
    COVERED_SHARE,
    QUANTITIES,
    Conditions,
    Figures,
    Interval,
    MoveOutcome,
    PastMove,
    Prediction,
    WriteWindow,
)
from migrate.plan import TELLING_PAGES
from migrate.stats import Report

__all__ = ["Lesson", "Score", "corrected", "effective", "lessons", "outcome_of", "quantile", "scores"]

# The latest moves that are looked at, and how much less each one counts than the one after it: hosts change.
MAX_LESSONS: Final = 60
FADING: Final = 0.93
# A move of the same hypervisor, to the same host, of the same guest says more about the next one. What the model gets
# wrong of one hypervisor's guests is nothing to those of another.
LIKE_HYPERVISOR: Final = 20.0
LIKE_DESTINATION: Final = 2.0
LIKE_GUEST: Final = 3.0
# The model's own interval is worth so many moves: it learns itself what these hosts take, and one move that was an
# exception says little against it.
PRIOR_MOVES: Final = 6.0
# After so many lessons a model errs half as one that has many does; one without any is worth little, and not nothing.
HALF_LEARNED: Final = 2
FIRST_LESSON: Final = 0.1
# A modelled interval is never taken to be narrower than this, nor made narrower than this share of itself.
MIN_HALF: Final = 0.1
MIN_NARROWING: Final = 0.3
# Where moves lie that are as the model says: deciles of a normal distribution that has its 10 % quantile at -1.
_BELIEVED: Final = tuple(
    statistics.NormalDist(0, 1 / 1.2816).inv_cdf(level / 20) for level in range(1, 20, 2)
)
# One move that was beyond everything (a host that was suspended meanwhile) must not make all that follow absurd: it is
# taken to be MAX_DISTANCE away, of which each step beyond the first is a factor of 2 at most.
MAX_DISTANCE: Final = 4.0
MAX_STEP: Final = math.log(2)
# Beyond the interval on either side.
TAIL: Final = (1 - COVERED_SHARE) / 2
# Rounds that are kept of an outcome.
MAX_WINDOWS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One past move and what it counts for the one that is looked at."""

    move: PastMove
    outcome: MoveOutcome
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How good predictions were in one quantity, over `moves` of them; without any the figures are None.

    `coverage` is the share of moves that ended within their interval, `bias` the median of actual over foretold median,
    `width` the median of high over low.
    """

    quantity: str
    moves: int
    coverage: float | None
    bias: float | None
    width: float | None


def outcome_of(
    report: Report, *, prediction_id: str, job: str, ended_at_s: float, cpu_s: float | None
) -> MoveOutcome:
    """Take from a report what later predictions learn from."""
    counts, rounds, down = report.counts, report.rounds, report.downtime
    first = rounds[0] if rounds else None
    zero_pages = min(counts.zero_pages, first.sent_pages) if first else 0
    data_bytes = (first.sent_pages - zero_pages) * PAGE_BYTES if first else 0
    zstd = counts.zstd_pages / max(counts.raw_pages + counts.zstd_pages, 1)
    rounds_s = sum(one.duration_s for one in rounds)
    # Of the rounds that catch up and the last one.
    late_pages = counts.pages - sum(one.sent_pages for one in rounds)
    # The longest say most about the working set.
    telling = sorted(rounds, key=lambda one: -one.duration_s)[:MAX_WINDOWS]
    return MoveOutcome(
        prediction_id=prediction_id,
        job=job,
        ended_at_s=ended_at_s,
        phase=report.phase,
        total_s=report.total_s,
        downtime_s=down.total_s if down else None,
        wire_bytes=report.wire_bytes,
        cpu_s=cpu_s,
        fixed_s=down.total_s - down.last_pages_s if down else None,
        last_s=down.last_pages_s if down and late_pages <= TELLING_PAGES else None,
        overhead_s=max(report.total_s - rounds_s - (down.total_s if down else 0.0), 0.0),
        windows=tuple(
            WriteWindow(window_s=one.duration_s, pages=round(one.dirty_rate_pages_per_s * one.duration_s))
            for one in telling
        ),
        first_s=first.duration_s if first else 0.0,
        first_raw_bytes=int(data_bytes * (1 - zstd)),
        first_zstd_bytes=int(data_bytes * zstd),
        first_wire_bytes=first.wire_bytes if first else 0,
        sent_pages=first.sent_pages if first else 0,
        zero_pages=counts.zero_pages,
        raw_pages=counts.raw_pages,
        zstd_pages=counts.zstd_pages,
        zstd_bytes=counts.zstd_bytes,
        delta_pages=counts.delta_pages,
        delta_bytes=counts.delta_bytes,
        error=(report.error or "")[:256],
    )


def lessons(past: Sequence[PastMove], conditions: Conditions) -> list[Lesson]:
    """Give the moves that were carried through, the newest last, with what each counts."""
    ended = [(one, one.outcome) for one in past if one.outcome is not None and one.outcome.is_complete]
    found = []
    for age, (move, outcome) in enumerate(reversed(ended[-MAX_LESSONS:])):
        then, weight = move.prediction.conditions, FADING**age
        weight *= LIKE_HYPERVISOR if then.hypervisor == conditions.hypervisor else 1.0
        weight *= LIKE_DESTINATION if then.destination == conditions.destination else 1.0
        weight *= LIKE_GUEST if then.guest_id == conditions.guest_id else 1.0
        if then.is_offline == conditions.is_offline:
            found.append(Lesson(move=move, outcome=outcome, weight=weight))
    return found[::-1]


def effective(weights: Sequence[float]) -> float:
    """Give how many equal ones these are worth."""
    squares = sum(one * one for one in weights)
    return sum(weights) ** 2 / squares if squares > 0 else 0.0


def quantile(weighted: Sequence[tuple[float, float]], level: float) -> float:
    """Give a quantile of (value, weight) pairs, between values in proportion. There is at least one."""
    ordered = sorted(weighted)
    total = sum(weight for _, weight in ordered)
    at, before = 0.0, None
    for value, weight in ordered:
        middle = (at + weight / 2) / total
        if level <= middle:
            if before is None:
                return value
            last, last_middle = before
            return last + (value - last) * (level - last_middle) / (middle - last_middle)
        before, at = (value, middle), at + weight
    return ordered[-1][0]


def corrected(modelled: Figures, learned: Sequence[Lesson]) -> Figures:
    """Shift and stretch what the model says by how it was wrong before."""
    return Figures(
        **{quantity: _corrected(modelled.of(quantity), learned, quantity) for quantity in QUANTITIES}
    )


def _corrected(interval: Interval, learned: Sequence[Lesson], quantity: str) -> Interval:
    seen = [
        (
            _distance(one.move.prediction.modelled.of(quantity), value),
            one.weight * _ripeness(one.move.prediction),
        )
        for one in learned
        if (value := one.outcome.value(quantity)) is not None and 0 < value < math.inf
    ]
    seen = [(distance, weight) for distance, weight in seen if math.isfinite(distance)]
    if not seen or not 0 < interval.low <= interval.median <= interval.high < math.inf:
        return interval
    worth = effective([weight for _, weight in seen])
    trust = worth / (worth + PRIOR_MOVES)
    # One lesson widens at once, and moves the middle when others agree.
    centre = trust**2 * quantile(seen, 0.5)
    # The model's own belief is PRIOR_MOVES more moves, which it says would lie around its median.
    each = PRIOR_MOVES * sum(weight for _, weight in seen) / worth / len(_BELIEVED)
    both = seen + [(centre + distance, each) for distance in _BELIEVED]
    middle = quantile(both, 0.5)
    # Of n moves the next one is beyond the outermost with a chance of 2 / (n + 1): the tails are taken wider for it.
    tail = TAIL * worth / (worth + 1)
    low, high = quantile(both, tail), quantile(both, 1 - tail)
    low, high = min(low, middle - MIN_NARROWING), max(high, middle + MIN_NARROWING)
    return Interval(low=_at(interval, low), median=_at(interval, middle), high=_at(interval, high))


def _ripeness(prediction: Prediction) -> float:
    """Give how much the error of a prediction says about those to come, which have its lesson and others.

    The first few, whose model knew nothing of these hosts, are far off, and would make all intervals wide until they
    have faded.
    """
    learned_from = max(prediction.learned_from, 0)
    return FIRST_LESSON + learned_from / (learned_from + HALF_LEARNED)


def _halves(interval: Interval) -> tuple[float, float]:
    """Give how far low and high are from the median, by magnitude."""
    below = math.log(interval.median / interval.low) if interval.low > 0 else math.inf
    above = math.log(interval.high / interval.median) if interval.median > 0 else math.inf
    return max(below, MIN_HALF), max(above, MIN_HALF)


def _distance(interval: Interval, value: float) -> float:
    """Give how far a value is from the median: -1 at low, 1 at high; infinite for an interval that cannot be.

    Beyond the interval it goes in steps of MAX_STEP at most: a model that knew nothing and was wrong has not shown that
    it is wrong by as much again.
    """
    if not 0 < interval.low <= interval.median <= interval.high < math.inf:
        return math.inf
    below, above = _halves(interval)
    far = math.log(value / interval.median)
    half = above if far >= 0 else below
    size = abs(far)
    found = size / half if size <= half else 1 + (size - half) / min(half, MAX_STEP)
    return math.copysign(min(found, MAX_DISTANCE), far)


def _at(interval: Interval, distance: float) -> float:
    """The inverse of `_distance`."""
    below, above = _halves(interval)
    half = above if distance >= 0 else below
    size = abs(distance)
    far = size * half if size <= 1 else half + (size - 1) * min(half, MAX_STEP)
    return interval.median * math.exp(math.copysign(far, distance))


def scores(
    past: Sequence[PastMove], figures: Callable[[PastMove], Figures] = lambda one: one.prediction.figures
) -> tuple[Score, ...]:
    """Give a score for each quantity, of all moves that have an outcome to compare."""
    found = []
    for quantity in QUANTITIES:
        pairs = [
            (figures(one).of(quantity), value)
            for one in past
            if one.outcome is not None and (value := one.outcome.value(quantity)) is not None
        ]
        pairs = [(interval, value) for interval, value in pairs if interval.median > 0 and interval.low > 0]
        n = len(pairs)
        found.append(
            Score(
                quantity=quantity,
                moves=n,
                coverage=sum(interval.holds(value) for interval, value in pairs) / n if n else None,
                bias=statistics.median(value / interval.median for interval, value in pairs) if n else None,
                width=statistics.median(interval.width for interval, _ in pairs) if n else None,
            )
        )
    return tuple(found)
