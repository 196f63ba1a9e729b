"""What a move will be: how long, how long the guest stands still, how much travels, whether it converges.

Law: pure, and the same for the same arguments (the draws have a fixed seed). Nothing here is a closed formula: each
prediction is DRAWS rehearsals (`migrate.rehearsal`) of the same planner that decides in a move, each with its own draw
of what is not certain: what the guest writes (`migrate.dirtying`), what its pages shrink to, what hosts and link carry.
Quantiles of the rehearsals are the intervals; `migrate.lessons` then corrects them by how past moves ended.

A known trap: a guest that is copied does not write as it did before. Tracking makes each first write of a page slower,
copying takes its CPU and memory bandwidth, and throttled or emulated guests write less (0.5 times and below); one that
starts a batch when the probe has ended writes 2 to 3 times as much. So rates have a factor of WRITE_SPREAD either way
until past moves have shown which one it is here, and an interval promises 80 % and no more.

Blocks for some 50 ms: use worker threads.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from memory.layout import PAGE_BYTES
from migrate.dirtying import DirtyModel, fit
from migrate.forecast import (
    Basis,
    Conditions,
    ContentSample,
    Figures,
    GuestLoad,
    Interval,
    PastMove,
    Prediction,
    Remedy,
)
from migrate.lessons import Lesson, corrected, effective, lessons, quantile
from migrate.rehearsal import (
    RAW_BYTES_PER_S,
    ZERO_BYTES_PER_S,
    ZSTD_BYTES_PER_S,
    Circumstances,
    Rehearsed,
    cpu_of,
    pages_cpu_s,
    rehearse,
)

__all__ = ["DRAWS", "predict"]

# The 10 % quantile of 150 draws is known to some 2 %; 0.2 ms each.
DRAWS: Final = 150
SEED: Final = 20260
# A limit that is named makes this share of the rehearsals converge.
REMEDY_SHARE: Final = 0.9
REMEDY_DRAWS: Final = 40
REMEDY_STEPS: Final = 14
# A spread is how far the 90 % quantile is from the median.
_Z: Final = 1.2816
WRITE_SPREAD: Final = 1.8
HOST_SPREAD: Final = 1.7
OVERHEAD_S: Final = (0.5, 2.0)
FIXED_S: Final = (0.008, 2.0)
LAST_S: Final = (0.003, 2.0)
LATE_S: Final = (0.03, 1.8)
CPU_SPREAD: Final = 1.5
# What has changed in a page, over its size, of a guest that nobody has watched: some words, or all of it.
DELTA_SHARE: Final = (0.02, 10.0)
# A measurement of the path, of a second, against what it carries for minutes.
GOODPUT_SPREAD: Final = 1.15
# Between two hosts that nobody has measured: 100 Mbit/s to 10 Gbit/s.
UNKNOWN_LINK_BYTES_PER_S: Final = (12.5e6, 1.25e9)
# A link that has carried so much may carry more, if what sent it was slower.
LINK_HEADROOM: Final = 4.0
# No part of a move that is worth learning from takes longer.
MAX_SECONDS: Final = 1e6
# A wire rate above this share of the cap says nothing about the hosts, one above it nothing about more of a link.
AT_THE_CAP: Final = 0.8
# A first round of fewer bytes says more about threads than about speeds.
TELLING_BYTES: Final = 4 << 20
# Moves of this guest whose rounds are taken as windows of its writes.
REMEMBERED_MOVES: Final = 3


def predict(
    conditions: Conditions,
    load: GuestLoad | None,
    past: Sequence[PastMove],
    *,
    prediction_id: str,
    made_at_s: float,
    seed: int = SEED,
    draws: int = DRAWS,
) -> Prediction:
    """Say what to expect of a move.

    Args:
        load: what a probe has measured; None: what earlier moves of this guest showed is taken, or, without any,
            nothing is known of it and the intervals are as wide as that.
        past: predictions with their outcomes, oldest first.
    """
    learned = lessons(past, conditions)
    of_guest = [one for one in learned if one.move.prediction.conditions.guest_id == conditions.guest_id]
    basis, seen = (Basis.MEASURED, load) if load is not None else (Basis.REMEMBERED, _remembered(of_guest))
    if seen is None:
        basis = Basis.ASSUMED
    world = _World(conditions, seen, basis, learned, of_guest)
    random_ = random.Random(seed)
    drawn = [world.draw(random_) for _ in range(draws)]
    rehearsed = [rehearse(conditions, one) for one in drawn]
    converging = [one for one in rehearsed if one.converges]
    share = len(converging) / len(rehearsed)
    # Of a move that may not converge, the figures are of the case that is the likelier one.
    telling = converging if share >= 0.5 else [one for one in rehearsed if not one.converges]
    modelled = Figures(
        total_s=_interval([one.total_s for one in telling]),
        downtime_s=_interval([one.downtime_s for one in telling]),
        wire_bytes=_interval([one.wire_bytes for one in telling]),
        cpu_s=_interval([one.cpu_s for one in telling]),
    )
    return Prediction(
        prediction_id=prediction_id,
        made_at_s=made_at_s,
        conditions=conditions,
        basis=basis,
        load=seen,
        modelled=modelled,
        figures=corrected(modelled, learned) if share >= 0.5 else modelled,
        learned_from=len(learned),
        converging_share=share,
        remedy=None if share >= 0.5 else _remedy(conditions, drawn, rehearsed),
        because=_typical(telling).because[:400],
    )


@dataclass(frozen=True, slots=True)
class _Known:
    """A figure that lessons may show: (value, weight) of each, and what is taken without any, as median and spread."""

    seen: tuple[tuple[float, float], ...]
    median: float
    spread: float

    def draw(self, random_: random.Random) -> float:
        """Draw one that was seen, nearly, or one that is assumed; lessons outweigh the assumption soon."""
        worth = effective([weight for _, weight in self.seen])
        if self.seen and random_.random() < worth / (worth + 1.0):
            value = random_.choices(self.seen, weights=[weight for _, weight in self.seen])[0][0]
            return value * random_.lognormvariate(0.0, 0.1)
        if self.seen and worth > 1.0:
            return quantile(self.seen, 0.5) * random_.lognormvariate(0.0, math.log(self.spread) / _Z)
        return self.median * random_.lognormvariate(0.0, math.log(self.spread) / _Z)


class _World:
    """Everything uncertain about a move, to be drawn from."""

    def __init__(
        self,
        conditions: Conditions,
        load: GuestLoad | None,
        basis: Basis,
        learned: Sequence[Lesson],
        of_guest: Sequence[Lesson],
    ) -> None:
        self._conditions, self._load, self._basis = conditions, load, basis
        total_pages = max(conditions.ram_bytes // PAGE_BYTES, 1)
        remembered = tuple(window for one in of_guest[-REMEMBERED_MOVES:] for window in one.outcome.windows)
        windows = load.windows if load is not None and basis is Basis.MEASURED else ()
        self._model: DirtyModel = fit(windows, total_pages, remembered)
        self._factor = _Known(_factors(learned), 1.0, WRITE_SPREAD if windows else 1.2)
        self._host = _Known(_host_factors(learned), 1.0, HOST_SPREAD)
        self._overhead = _Known(
            _seconds((one.outcome.overhead_s, one.weight) for one in learned), *OVERHEAD_S
        )
        self._fixed = _Known(_seconds((one.outcome.fixed_s, one.weight) for one in learned), *FIXED_S)
        self._last = _Known(_seconds((one.outcome.last_s, one.weight) for one in learned), *LAST_S)
        self._delta = _delta_share(load, of_guest)
        self._cpu = _Known(_cpu_factors(learned), 1.0, CPU_SPREAD)
        self._link = _link(conditions, learned)

    def draw(self, random_: random.Random) -> Circumstances:
        """Draw one set of circumstances that may be true."""
        populated, data_share, zstd_share = self._content(random_)
        low, high = self._link
        path = math.exp(random_.uniform(math.log(low), math.log(max(high, low))))
        cap = self._conditions.bandwidth_bytes_per_s or math.inf
        return Circumstances(
            curve=self._model.draw(random_, self._factor.draw(random_)),
            populated_pages=populated,
            data_share=data_share,
            zstd_share=zstd_share,
            delta_share=self._delta.draw(random_),
            host_factor=self._host.draw(random_),
            path_bytes_per_s=path,
            cap_bytes_per_s=cap,
            overhead_s=self._overhead.draw(random_),
            fixed_s=self._fixed.draw(random_),
            last_s=self._last.draw(random_),
            late_s=LATE_S[0] * random_.lognormvariate(0.0, math.log(LATE_S[1]) / _Z),
            cpu_factor=self._cpu.draw(random_),
        )

    def _content(self, random_: random.Random) -> tuple[int, float, float]:
        """Draw populated pages, the share of them with data, and what that shrinks to."""
        load = self._load
        most = self._conditions.ram_bytes
        if load is None:
            return (
                int(most * random_.uniform(0.1, 1.0)) // PAGE_BYTES,
                random_.uniform(0.5, 1.0),
                random_.uniform(0.2, 1.0),
            )
        spread = 0.01 if self._basis is Basis.MEASURED else 0.1
        populated = min(load.populated_bytes * random_.lognormvariate(0.0, spread), most)
        sample = load.sample
        if sample.pages <= 0:
            return int(populated) // PAGE_BYTES, 1.0, random_.uniform(0.3, 1.0)
        share = min(max(sample.data_pages / sample.pages, 0.0), 1.0)
        # Pages come in runs of equal kind, so that a sample is worth less than its pages.
        error = math.sqrt(max(share * (1 - share), 0.01) / max(sample.pages / 8, 1))
        share = min(max(random_.gauss(share, error), 0.0), 1.0)
        data_bytes = max(sample.data_pages * PAGE_BYTES, 1)
        shrunk = min(sample.zstd_bytes / data_bytes, 1.0) if sample.data_pages > 0 else 1.0
        return (
            int(populated) // PAGE_BYTES,
            share,
            min(max(shrunk * random_.lognormvariate(0.0, 0.08), 1e-3), 1.0),
        )


def _remembered(of_guest: Sequence[Lesson]) -> GuestLoad | None:
    """Make a load of what this guest's last move showed."""
    if not of_guest or of_guest[-1].outcome.sent_pages <= 0:
        return None
    outcome, before = of_guest[-1].outcome, of_guest[-1].move.prediction.load
    zstd_page_bytes = outcome.zstd_pages * PAGE_BYTES
    share = outcome.zstd_bytes / zstd_page_bytes if zstd_page_bytes > 0 else 0.6
    if before is not None and before.sample.data_pages > 0:
        share = before.sample.zstd_bytes / (before.sample.data_pages * PAGE_BYTES)
    pages = max(outcome.sent_pages, outcome.zero_pages)
    data_pages = pages - outcome.zero_pages
    return GuestLoad(
        populated_bytes=pages * PAGE_BYTES,
        windows=outcome.windows,
        sample=ContentSample(
            pages=pages,
            zero_pages=outcome.zero_pages,
            duplicate_pages=0,
            zstd_bytes=int(min(max(share, 0.0), 1.0) * data_pages * PAGE_BYTES),
        ),
        took_s=0.0,
    )


def _delta_share(load: GuestLoad | None, of_guest: Sequence[Lesson]) -> _Known:
    """Give what a page that is written again shrinks to: as the probe saw it, or as this guest's moves did."""
    if load is not None and load.rewritten_pages > 0:
        share = load.delta_bytes / (load.rewritten_pages * PAGE_BYTES)
        return _Known((), min(max(share, 1e-4), 1.0), 1.5)
    seen = [
        (min(max(one.outcome.delta_bytes / (one.outcome.delta_pages * PAGE_BYTES), 1e-4), 1.0), one.weight)
        for one in of_guest
        if one.outcome.delta_pages > 0
    ]
    return _Known(tuple(seen), *DELTA_SHARE)


def _seconds(seen: Iterable[tuple[float | None, float]]) -> tuple[tuple[float, float], ...]:
    """Leave out what no time can be: a store may say anything."""
    return tuple((value, weight) for value, weight in seen if value is not None and 0 < value < MAX_SECONDS)


def _factors(learned: Sequence[Lesson]) -> tuple[tuple[float, float], ...]:
    """Give how much more or less guests wrote while they were copied than their probes had shown."""
    found = []
    for one in learned:
        prediction, windows = one.move.prediction, one.outcome.windows
        if prediction.basis is not Basis.MEASURED or prediction.load is None or not windows:
            continue
        total_pages = max(prediction.conditions.ram_bytes // PAGE_BYTES, 1)
        model = fit(prediction.load.windows, total_pages)
        longest = max(windows, key=lambda window: window.window_s)
        if not 0 < longest.window_s < MAX_SECONDS or longest.pages < 0:
            continue
        # Within the probe's reach alone: beyond it the curve is a guess, and no lesson about the guest.
        expected = _median_pages(model, min(longest.window_s, 2 * model.longest_s))
        if longest.window_s <= 2 * model.longest_s and expected >= 64:
            found.append((min(max(longest.pages / expected, 0.1), 10.0), one.weight))
    return tuple(found)


def _median_pages(model: DirtyModel, time_s: float) -> float:
    """Give the pages that the middle one of a model's curves has written in a time."""
    random_ = random.Random(SEED)
    pages = sorted(model.draw(random_, 1.0).pages(time_s) for _ in range(9))
    return pages[len(pages) // 2]


def _host_factors(learned: Sequence[Lesson]) -> tuple[tuple[float, float], ...]:
    """Give how fast the hosts were with pages where no cap held them back."""
    found = []
    for one in learned:
        outcome, then = one.outcome, one.move.prediction.conditions
        limits = [x for x in (then.bandwidth_bytes_per_s, then.goodput_bytes_per_s) if x]
        if limits and outcome.first_wire_rate_bytes_per_s > AT_THE_CAP * min(limits):
            continue
        if outcome.first_page_bytes < TELLING_BYTES or not 0 < outcome.first_s < MAX_SECONDS:
            continue
        ideal_s = outcome.first_raw_bytes / RAW_BYTES_PER_S + outcome.first_zstd_bytes / ZSTD_BYTES_PER_S
        ideal_s += outcome.zero_pages * PAGE_BYTES / ZERO_BYTES_PER_S
        found.append((min(max(ideal_s / outcome.first_s, 0.01), 10.0), one.weight))
    return tuple(found)


def _cpu_factors(learned: Sequence[Lesson]) -> tuple[tuple[float, float], ...]:
    """Give what moves took of the CPU over what their pages should have taken."""
    found = []
    for one in learned:
        outcome = one.outcome
        if (
            outcome.cpu_s is None
            or not 0 < outcome.cpu_s < MAX_SECONDS
            or not 0 < outcome.total_s < MAX_SECONDS
        ):
            continue
        pages_s = pages_cpu_s(
            outcome.raw_pages * PAGE_BYTES,
            outcome.zstd_pages * PAGE_BYTES,
            outcome.zero_pages * PAGE_BYTES,
            outcome.delta_pages * PAGE_BYTES,
        )
        ideal_s = cpu_of(
            one.move.prediction.conditions,
            pages_cpu_s=pages_s,
            populated_bytes=outcome.sent_pages * PAGE_BYTES,
            total_s=outcome.total_s,
        )
        if ideal_s > 0:
            found.append((min(max(outcome.cpu_s / ideal_s, 0.01), 10.0), one.weight))
    return tuple(found)


def _link(conditions: Conditions, learned: Sequence[Lesson]) -> tuple[float, float]:
    """Give between which rates the path's is, by magnitude: measured, seen in past moves, or anything that is built."""
    if conditions.goodput_bytes_per_s and conditions.goodput_bytes_per_s > 0:
        return (
            conditions.goodput_bytes_per_s / GOODPUT_SPREAD,
            conditions.goodput_bytes_per_s * GOODPUT_SPREAD,
        )
    carried = max(
        (
            one.outcome.first_wire_rate_bytes_per_s
            for one in learned
            if one.move.prediction.conditions.destination == conditions.destination
        ),
        default=0.0,
    )
    was_free = any(
        one.move.prediction.conditions.bandwidth_bytes_per_s is None
        for one in learned
        if one.move.prediction.conditions.destination == conditions.destination
    )
    low, high = UNKNOWN_LINK_BYTES_PER_S
    if carried <= 0:
        return low, high
    return (carried, carried * LINK_HEADROOM) if was_free else (carried, max(high, carried))


def _remedy(conditions: Conditions, drawn: Sequence[Circumstances], rehearsed: Sequence[Rehearsed]) -> Remedy:
    """Look for the smallest limit, of each kind alone, with which nearly all rehearsals converge."""
    few = list(drawn[:REMEDY_DRAWS])
    stops = sorted(one.downtime_s for one in rehearsed)
    limit_s = max(stops[int(len(stops) * REMEDY_SHARE)] * 1.05, conditions.downtime_limit_s * 1.1)
    found_limit_s = None
    for _ in range(REMEDY_STEPS):
        if _share(replace(conditions, downtime_limit_s=limit_s), few) >= REMEDY_SHARE:
            found_limit_s = limit_s
            break
        limit_s *= 1.4
    found_cap = None
    cap = conditions.bandwidth_bytes_per_s
    for _ in range(REMEDY_STEPS if cap else 0):
        cap = (cap or 0.0) * 1.5
        # A path that nobody has measured is taken to carry it: who raises the cap will see.
        is_known = conditions.goodput_bytes_per_s is not None
        faster = [
            replace(one, cap_bytes_per_s=cap, path_bytes_per_s=one.path_bytes_per_s if is_known else cap)
            for one in few
        ]
        if _share(replace(conditions, bandwidth_bytes_per_s=cap), faster) >= REMEDY_SHARE:
            found_cap = cap
            break
    return Remedy(downtime_limit_s=found_limit_s, bandwidth_bytes_per_s=found_cap)


def _share(conditions: Conditions, drawn: Sequence[Circumstances]) -> float:
    return sum(rehearse(conditions, one).converges for one in drawn) / max(len(drawn), 1)


def _interval(values: Sequence[float]) -> Interval:
    weighted = [(value, 1.0) for value in values]
    return Interval(low=quantile(weighted, 0.1), median=quantile(weighted, 0.5), high=quantile(weighted, 0.9))


def _typical(rehearsed: Sequence[Rehearsed]) -> Rehearsed:
    """Give the rehearsal with the middle total."""
    return sorted(rehearsed, key=lambda one: one.total_s)[len(rehearsed) // 2]
