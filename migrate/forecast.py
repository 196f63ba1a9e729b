"""What is foretold of a move, and what became of it: the values that predictions are made of.

Law: frozen values with units in their names, checked where they are used: a store on disk or a peer may give any
number. Nothing is computed here but arithmetic on a value's own fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from migrate.compression import Compression
from migrate.phases import Phase
from migrate.plan import OnTimeout, Policy

__all__ = [
    "COVERED_SHARE",
    "MAX_PROBE_S",
    "MIN_PROBE_S",
    "PROBE_S",
    "QUANTITIES",
    "Basis",
    "Conditions",
    "ContentSample",
    "Figures",
    "GuestLoad",
    "Interval",
    "MoveOutcome",
    "PastMove",
    "Prediction",
    "Remedy",
    "WriteWindow",
]

# An interval goes from the 10 % to the 90 % quantile.
COVERED_SHARE: Final = 0.8
# Within the two seconds that a check may take, and long enough for the working set of a guest that writes all of it
# twice a second; a guest that does it once in ten needs `--predict-for 5s` to show it.
PROBE_S: Final = 1.0
MIN_PROBE_S: Final = 0.1
# Longer than this no operator waits for a check, and its request's time would be over.
MAX_PROBE_S: Final = 30.0
QUANTITIES: Final = ("total_s", "downtime_s", "wire_bytes", "cpu_s")


class Basis(StrEnum):
    """Where the guest's writes and content are known from."""

    MEASURED = "measured"
    REMEMBERED = "remembered"
    ASSUMED = "assumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure that is not known yet: with 10 % below `low`, half below `median`, 10 % above `high`."""

    low: float
    median: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def width(self) -> float:
        """High over low; 1 where both are nothing."""
        return self.high / self.low if self.low > 0 else 1.0 if self.high <= 0 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteWindow:
    """How many different pages were written in a window of time; a page that is written twice counts once."""

    window_s: float
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentSample:
    """Some pages that may differ from zero, as the codec would send them.

    `duplicate_pages` are those with data that another page of the sample equals. `zstd_bytes` is what `data_pages`
    become as payload.
    """

    pages: int
    zero_pages: int
    duplicate_pages: int
    zstd_bytes: int

    @property
    def data_pages(self) -> int:
        return self.pages - self.zero_pages


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestLoad:
    """What a guest writes and what its RAM holds. Holes, which are never sent, are no part of `populated_bytes`.

    `delta_bytes` of payload is what had changed in `rewritten_pages` that were written twice while it was watched.
    """

    populated_bytes: int
    windows: tuple[WriteWindow, ...]
    sample: ContentSample
    took_s: float
    rewritten_pages: int = 0
    delta_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Which move, within which limits. `goodput_bytes_per_s` is what the path was measured to carry; None: unknown."""

    guest_id: str
    guest_name: str
    hypervisor: str
    source: str
    destination: str
    ram_bytes: int
    downtime_limit_s: float
    timeout_s: float
    on_timeout: OnTimeout
    bandwidth_bytes_per_s: float | None
    goodput_bytes_per_s: float | None
    is_offline: bool
    compression: Compression
    audit: bool
    delta_cache_bytes: int = 0

    @property
    def policy(self) -> Policy:
        return Policy(
            downtime_limit_s=self.downtime_limit_s,
            timeout_s=self.timeout_s,
            on_timeout=self.on_timeout,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            is_offline=self.is_offline,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The four quantities; terms are those of `migrate.stats`. `cpu_s` is of the source's agent, its proof included."""

    total_s: Interval
    downtime_s: Interval
    wire_bytes: Interval
    cpu_s: Interval

    def of(self, quantity: str) -> Interval:
        """Give one of QUANTITIES by its name."""
        found: Interval = getattr(self, quantity)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """With which limit a move would converge that will not; None: no value of that limit was found to do it alone."""

    downtime_limit_s: float | None
    bandwidth_bytes_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is expected of one move.

    `modelled` is what the model says, `figures` what is left of it after the lessons of `learned_from` past moves:
    later moves learn from the first, so that corrections do not add up. `converging_share` of the rehearsals ended
    within the limits. `made_at_s` is Unix time.
    """

    prediction_id: str
    made_at_s: float
    conditions: Conditions
    basis: Basis
    load: GuestLoad | None
    modelled: Figures
    figures: Figures
    learned_from: int
    converging_share: float
    remedy: Remedy | None
    because: str

    @property
    def converges(self) -> bool:
        """More likely than not."""
        return self.converging_share >= 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOutcome:
    """How a move ended for which there was a prediction. None: not known of this move.

    `windows` are the writes that its rounds saw. `first_s` is how long the first round sent `first_raw_bytes`,
    `first_zstd_bytes` (both of pages), and `first_wire_bytes` on the wire for them. `fixed_s` is the downtime without
    its last pages, `last_s` that of its last pages, where they were too few to tell of the link, and `overhead_s` what
    the move took beside its rounds and its downtime.
    """

    prediction_id: str
    job: str
    ended_at_s: float
    phase: Phase
    total_s: float
    downtime_s: float | None
    wire_bytes: int
    cpu_s: float | None
    fixed_s: float | None
    overhead_s: float
    last_s: float | None = None
    windows: tuple[WriteWindow, ...] = ()
    first_s: float = 0.0
    first_raw_bytes: int = 0
    first_zstd_bytes: int = 0
    first_wire_bytes: int = 0
    sent_pages: int = 0
    zero_pages: int = 0
    raw_pages: int = 0
    zstd_pages: int = 0
    zstd_bytes: int = 0
    delta_pages: int = 0
    delta_bytes: int = 0
    error: str = ""

    @property
    def is_complete(self) -> bool:
        return self.phase is Phase.COMPLETE

    def value(self, quantity: str) -> float | None:
        """Give one of QUANTITIES as it was; None: a move that was not made has none to compare."""
        if not self.is_complete:
            return None
        found: float | None = getattr(self, quantity)
        return found

    @property
    def first_wire_rate_bytes_per_s(self) -> float:
        return self.first_wire_bytes / self.first_s if 0 < self.first_s < 1e6 else 0.0

    @property
    def first_page_bytes(self) -> int:
        return self.first_raw_bytes + self.first_zstd_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PastMove:
    """A prediction beside its outcome; None while there is none, or for ever where no move followed."""

    prediction: Prediction
    outcome: MoveOutcome | None
