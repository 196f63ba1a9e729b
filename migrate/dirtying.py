"""How many different pages a guest writes in a time: a curve that saturates, fitted to what windows of writes showed.

Law: pure. A guest that writes the same pages again and again dirties no more of them in an hour than in a second (its
writable working set), and one that walks through its RAM dirties in proportion to time. Both together are

    w(t) = W * (1 - exp(-t / tau)) + S * (1 - exp(-r * t / S))

of which W pages with time constant tau are the hot set, and r pages a second go through a cold one of S pages. A
window cannot show what happens long after its end, so there is no best curve but a set of those that fit, drawn by
their weight.

Source: Clark et al., Live Migration of Virtual Machines (NSDI 2005), 4: the writable working set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migrate.forecast import WriteWindow

__all__ = ["Curve", "DirtyModel", "fit"]

# A count of one window differs by so much from what the next one of the same length shows: the timing of both harvests,
# and a guest that does not write evenly.
WINDOW_NOISE: Final = 0.15
# Windows of an earlier move were seen while it was copied, on a host with other work: they say less.
REMEMBERED_NOISE: Final = 0.4
# Fewer pages than this are a guest's clock tick and the like.
NOISE_PAGES: Final = 8.0
_TAUS: Final = 24
# Saturation is looked for between a third of the shortest window and so many longest ones.
_LONGEST_TAU: Final = 100.0
# A guest nobody has looked at: the median and the spread of the rates that guests of any kind show.
ASSUMED_PAGES_PER_S: Final = 2_000.0
ASSUMED_SPREAD: Final = 5.0
ASSUMED_SET_SHARE: Final = (0.01, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One curve; see the top of this module. `factor` is how much more or less is written while RAM is copied."""

    hot_pages: float
    tau_s: float
    rate_pages_per_s: float
    cold_pages: float
    total_pages: int
    factor: float = 1.0

    def pages(self, time_s: float) -> float:
        """Give how many different pages are written in so long a time."""
        if time_s <= 0:
            return 0.0
        # Who writes faster is through its working set sooner; the set does not grow.
        time_s *= self.factor
        hot = self.hot_pages * -math.expm1(-time_s / self.tau_s)
        cold = (
            self.cold_pages * -math.expm1(-self.rate_pages_per_s * time_s / self.cold_pages)
            if self.cold_pages > 0
            else 0.0
        )
        return min(hot + cold, float(self.total_pages))


@dataclass(frozen=True, slots=True, kw_only=True)
class DirtyModel:
    """The curves that fit, as (hot pages, tau, rate, weight); none where nothing is known."""

    fits: tuple[tuple[float, float, float, float], ...]
    total_pages: int
    longest_s: float

    def draw(self, random_: random.Random, factor: float) -> Curve:
        """Draw one of the curves that may be true."""
        if not self.fits:
            return self._assumed(random_, factor)
        hot, tau_s, rate, _ = random_.choices(self.fits, weights=[one[3] for one in self.fits])[0]
        # What is walked through ends somewhere between what was seen of it and all of the RAM.
        seen = max(rate * self.longest_s, 1.0)
        cold = _between(random_, seen, float(max(self.total_pages, 1))) if rate > 0 else 0.0
        return Curve(
            hot_pages=hot,
            tau_s=tau_s,
            rate_pages_per_s=rate,
            cold_pages=max(cold, seen) if rate > 0 else 0.0,
            total_pages=self.total_pages,
            factor=factor,
        )

    def _assumed(self, random_: random.Random, factor: float) -> Curve:
        rate = random_.lognormvariate(math.log(ASSUMED_PAGES_PER_S), math.log(ASSUMED_SPREAD) / 1.28)
        low, high = ASSUMED_SET_SHARE
        hot = _between(random_, max(low * self.total_pages, 1.0), max(high * self.total_pages, 1.0))
        return Curve(
            hot_pages=hot,
            tau_s=hot / rate,
            rate_pages_per_s=0.0,
            cold_pages=0.0,
            total_pages=self.total_pages,
            factor=factor,
        )


def fit(
    windows: Sequence[WriteWindow], total_pages: int, remembered: Sequence[WriteWindow] = ()
) -> DirtyModel:
    """Find the curves that agree with the windows of a probe and, where there are any, of an earlier move.

    Windows that cannot be (no time, no number) are left out.
    """
    points = [
        (one.window_s, float(min(one.pages, total_pages)), noise)
        for group, noise in ((windows, WINDOW_NOISE), (remembered, REMEMBERED_NOISE))
        for one in group
        if math.isfinite(one.window_s) and one.window_s > 0 and one.pages >= 0
    ]
    if not points:
        return DirtyModel(fits=(), total_pages=total_pages, longest_s=0.0)
    shortest_s, longest_s = min(p[0] for p in points), max(p[0] for p in points)
    low, high = math.log(shortest_s / 3), math.log(longest_s * _LONGEST_TAU)
    found = [
        _with_tau(points, math.exp(low + (high - low) * step / (_TAUS - 1)), total_pages)
        for step in range(_TAUS)
    ]
    best = min(misfit for *_, misfit in found)
    fits = tuple((hot, tau, rate, math.exp(-(misfit - best) / 2)) for hot, tau, rate, misfit in found)
    return DirtyModel(fits=fits, total_pages=total_pages, longest_s=longest_s)


def _with_tau(
    points: Sequence[tuple[float, float, float]], tau_s: float, total_pages: int
) -> tuple[float, float, float, float]:
    """Give (hot, tau, rate, misfit) of the best curve with this time constant: least squares, nothing negative."""
    rows = []
    for time_s, pages, noise in points:
        sigma = noise * pages + NOISE_PAGES
        rows.append((-math.expm1(-time_s / tau_s) / sigma, time_s / sigma, pages / sigma))
    aa = sum(a * a for a, _, _ in rows)
    bb = sum(b * b for _, b, _ in rows)
    ab = sum(a * b for a, b, _ in rows)
    ay = sum(a * y for a, _, y in rows)
    by = sum(b * y for _, b, y in rows)
    # With one of the two alone, and with both where that gives neither a negative amount.
    tried = [(ay / aa if aa > 0 else 0.0, 0.0), (0.0, by / bb if bb > 0 else 0.0)]
    if (determinant := aa * bb - ab * ab) > 1e-9 * aa * bb:
        both = ((ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant)
        if min(both) >= 0:
            tried.append(both)
    hot, rate, misfit = min(
        (
            (hot, rate, sum((a * hot + b * rate - y) ** 2 for a, b, y in rows))
            for hot, rate in tried
            if hot <= 2 * total_pages
        ),
        key=lambda one: one[2],
        default=(0.0, by / bb if bb > 0 else 0.0, math.inf),
    )
    return hot, tau_s, rate, misfit


def _between(random_: random.Random, low: float, high: float) -> float:
    """Draw evenly by magnitude."""
    if high <= low:
        return low
    return math.exp(random_.uniform(math.log(low), math.log(high)))
