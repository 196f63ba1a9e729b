"""The planner: after each round, what to do next and why.

Law: pure; a decision depends on its arguments alone. Every decision carries its reason in words that the
person who watches the move can act on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from memory.layout import PAGE_BYTES
from migrate.stats import RoundStats

__all__ = [
    "ASSUMED_FIXED_S",
    "ASSUMED_GOODPUT_BYTES_PER_S",
    "FIRST_LOOK_S",
    "LOOKS_GROW",
    "TELLING_PAGES",
    "Decision",
    "Next",
    "OnTimeout",
    "Policy",
    "catches_up",
    "decide",
    "has_much_left",
    "is_in_sight",
    "predicted_downtime_s",
]

# Another round is worth its time while it leaves less than so much of what is left to copy at the stop. Within
# the limit that time is bounded: rounds that shrink by a fifth cost at most five downtimes together.
WORTHWHILE_SHRINK: Final = 0.8
# Below this the last pages cost less than the noise of the fixed parts (pause, load, resume: 1-5 ms).
NEGLIGIBLE_LAST_PAGES_S: Final = 0.001
# While a second preflight and an arming are not over at the decision the guest writes on. Rounds that send this shrink
# like those before them; while a few pages are sent a fast guest writes as many again.
MAX_CATCH_UPS: Final = 4
FEW_PAGES: Final = 64
# A stop that would copy for longer is worth such rounds in any case. A decision goes by what the last round carried,
# and deltas carry more: in the next one most pages have bases.
LONG_LAST_PAGES_S: Final = 0.01
# Rounds without a new minimum of dirty pages before the planner calls it: the write rate of a real guest
# swings, and a single worse round says nothing.
STALLED_ROUNDS: Final = 12
# The first look at the dirty log within the first round, and how much longer it is until each next one: a guest that
# writes shows its pages early, and of a round that takes minutes a dozen looks are enough.
FIRST_LOOK_S: Final = 0.05
LOOKS_GROW: Final = 1.5
# Pause, device state, load and resume together, before they are measured: 3-8 ms with an embedded guest.
ASSUMED_FIXED_S: Final = 0.008
# A round of fewer pages says more about thread wake-ups than about the link.
TELLING_PAGES: Final = 256
# What a link is taken to carry before a round has told: the slowest that anybody builds for migration.
ASSUMED_GOODPUT_BYTES_PER_S: Final = 100e6


class OnTimeout(StrEnum):
    """What happens when the limits of a move cannot be met."""

    ABORT = "abort"
    SUSPEND = "suspend"


class Next(StrEnum):
    """What the procedure does next."""

    AGAIN = "again"
    SWITCH_OVER = "switch-over"
    SUSPEND = "suspend"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The limits that the caller gave. `timeout_s` 0 means none; it counts from the first page."""

    downtime_limit_s: float = 0.3
    timeout_s: float = 0.0
    on_timeout: OnTimeout = OnTimeout.ABORT
    bandwidth_bytes_per_s: float | None = None
    is_offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do next, and why."""

    next: Next
    because: str
    predicted_downtime_s: float


def predicted_downtime_s(round_stats: RoundStats, fixed_s: float) -> float:
    """Give the downtime to expect if the guest were stopped now.

    Args:
        round_stats: the round that has just ended.
        fixed_s: pause, device state, load and resume together, as measured or assumed.
    """
    return fixed_s + _copy_s(round_stats, round_stats.dirty_pages)


def _copy_s(round_stats: RoundStats, pages: int) -> float:
    if pages == 0:
        return 0.0
    if round_stats.goodput_bytes_per_s <= 0:
        return float("inf")
    return pages * PAGE_BYTES / round_stats.goodput_bytes_per_s


def is_in_sight(decision: Decision, policy: Policy) -> bool:
    """Judge whether a stop would do now, though another round is worth its time."""
    return decision.predicted_downtime_s <= policy.downtime_limit_s


def has_much_left(decision: Decision, fixed_s: float) -> bool:
    """Judge whether a stop that was decided on would copy for long; `fixed_s` as in `decide`."""
    return decision.predicted_downtime_s - fixed_s > LONG_LAST_PAGES_S


def catches_up(rounds: int, sent_pages: int, dirty_pages: int) -> bool:
    """Judge a short round that follows the decision: whether one more would make the stop shorter.

    Args:
        rounds: how many there were, this one included.
        sent_pages: what it sent.
        dirty_pages: what the guest wrote meanwhile.
    """
    shrinks = dirty_pages < sent_pages * WORTHWHILE_SHRINK
    return rounds < MAX_CATCH_UPS and dirty_pages > FEW_PAGES and shrinks


def decide(rounds: Sequence[RoundStats], policy: Policy, fixed_s: float) -> Decision:
    """Judge the rounds so far.

    Args:
        rounds: all rounds, oldest first; at least one.
        policy: the caller's limits.
        fixed_s: see predicted_downtime_s.
    """
    last = rounds[-1]
    copy_s = _copy_s(last, last.dirty_pages)
    predicted_s = fixed_s + copy_s
    round_s = copy_s + _overhead_s(rounds)
    next_dirty_pages = last.dirty_rate_pages_per_s * round_s
    fits = predicted_s <= policy.downtime_limit_s
    limit_ms = policy.downtime_limit_s * 1e3

    if fits and copy_s <= NEGLIGIBLE_LAST_PAGES_S:
        return Decision(
            next=Next.SWITCH_OVER,
            because=f"{last.dirty_pages} dirty pages are copied in {copy_s * 1e3:.1f} ms: nothing left to gain",
            predicted_downtime_s=predicted_s,
        )
    if len(rounds) > 1 and _rounds_since_minimum(rounds) >= STALLED_ROUNDS:
        return _give_up_shrinking(rounds, policy, predicted_s, fits)
    if next_dirty_pages < last.dirty_pages * WORTHWHILE_SHRINK:
        return Decision(
            next=Next.AGAIN,
            because=f"a round of {round_s * 1e3:.0f} ms would leave about {next_dirty_pages:.0f} of "
            f"{last.dirty_pages} dirty pages",
            predicted_downtime_s=predicted_s,
        )
    if fits:
        return Decision(
            next=Next.SWITCH_OVER,
            because=f"predicted downtime {predicted_s * 1e3:.0f} ms is within {limit_ms:.0f} ms, and another "
            "round would not make it much shorter",
            predicted_downtime_s=predicted_s,
        )
    return Decision(
        next=Next.AGAIN,
        because=f"predicted downtime {predicted_s * 1e3:.0f} ms is over {limit_ms:.0f} ms: waiting for a "
        "quieter moment of the guest",
        predicted_downtime_s=predicted_s,
    )


def _overhead_s(rounds: Sequence[RoundStats]) -> float:
    """Give what a round takes beside its pages (harvest, drain, barrier), by the median of those there were.

    The first round tells nothing of it: it scans all RAM. Without this a guest whose every round leaves what the
    overhead lets it write is copied again and again, for nothing; the quickest round alone made ten of them.
    """
    overheads = [max(one.duration_s - _copy_s(one, one.sent_pages), 0.0) for one in rounds[1:]]
    return statistics.median(overheads) if overheads else 0.0


def _rounds_since_minimum(rounds: Sequence[RoundStats]) -> int:
    """Rounds after the last one that set a new minimum of dirty pages."""
    best = min(range(len(rounds)), key=lambda i: (rounds[i].dirty_pages, i))
    return len(rounds) - 1 - best


def _give_up_shrinking(
    rounds: Sequence[RoundStats], policy: Policy, predicted_s: float, fits: bool
) -> Decision:
    last = rounds[-1]
    if fits:
        return Decision(
            next=Next.SWITCH_OVER,
            because=f"{STALLED_ROUNDS} rounds brought no new minimum, and {predicted_s * 1e3:.0f} ms is within "
            "the limit",
            predicted_downtime_s=predicted_s,
        )
    rate = last.dirty_rate_pages_per_s * PAGE_BYTES / 1e6
    why = (
        f"the guest writes {rate:.0f} MB/s and the link moves {last.goodput_bytes_per_s / 1e6:.0f} MB/s of its "
        f"RAM: {STALLED_ROUNDS} rounds brought no new minimum, and the downtime would be "
        f"{predicted_s * 1e3:.0f} ms instead of {policy.downtime_limit_s * 1e3:.0f} ms"
    )
    return Decision(
        next=Next.SUSPEND if policy.on_timeout is OnTimeout.SUSPEND else Next.ABORT,
        because=why,
        predicted_downtime_s=predicted_s,
    )
