"""Figures of a migration: what is counted while it runs, and the report at its end.

Law: frozen values with units in their names; each term is defined here and means the same in metrics, JSON
and docs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from migrate.phases import Phase

__all__ = ["DowntimeParts", "PageCounts", "Progress", "Report", "RoundStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """Pages sent, by the kind they travelled as, and the bytes of their payloads before sealing.

    A page that was sent in three rounds counts three times. Holes of the guest's RAM are never sent.
    """

    zero_pages: int = 0
    raw_pages: int = 0
    zstd_pages: int = 0
    delta_pages: int = 0
    raw_bytes: int = 0
    zstd_bytes: int = 0
    delta_bytes: int = 0

    @property
    def pages(self) -> int:
        """All pages sent."""
        return self.zero_pages + self.raw_pages + self.zstd_pages + self.delta_pages

    @property
    def by_kind(self) -> dict[str, int]:
        """Pages by the kind they travelled as, by its name."""
        return {
            "zero": self.zero_pages,
            "raw": self.raw_pages,
            "zstd": self.zstd_pages,
            "delta": self.delta_pages,
        }

    def __add__(self, other: PageCounts) -> PageCounts:
        return PageCounts(
            zero_pages=self.zero_pages + other.zero_pages,
            raw_pages=self.raw_pages + other.raw_pages,
            zstd_pages=self.zstd_pages + other.zstd_pages,
            delta_pages=self.delta_pages + other.delta_pages,
            raw_bytes=self.raw_bytes + other.raw_bytes,
            zstd_bytes=self.zstd_bytes + other.zstd_bytes,
            delta_bytes=self.delta_bytes + other.delta_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStats:
    """One pass over the dirty pages.

    `dirty_pages` is the work of the next round: what the guest had written when this one ended and what was not sent
    since. `dirty_rate_pages_per_s` counts each page that it wrote in the round once, also what was sent after that.
    `goodput_bytes_per_s` is guest RAM moved per second of sending, after compression did its part.
    """

    number: int
    duration_s: float
    sent_pages: int
    wire_bytes: int
    dirty_pages: int
    dirty_rate_pages_per_s: float
    goodput_bytes_per_s: float
    predicted_downtime_s: float = 0.0
    because: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DowntimeParts:
    """Where the downtime went. Downtime counts from the request to pause the guest at the source until
    the destination's word that it runs has arrived at the source.

    Pages and device state travel at once: what `last_pages_s` does not cover of that is `device_state_s`.
    """

    pause_s: float
    last_pages_s: float
    device_state_s: float
    load_s: float
    resume_s: float

    @property
    def total_s(self) -> float:
        """The parts follow each other without gaps."""
        return self.pause_s + self.last_pages_s + self.device_state_s + self.load_s + self.resume_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A running migration as watchers see it."""

    phase: Phase
    round_number: int = 0
    dirty_pages: int = 0
    remaining_pages: int = 0
    counts: PageCounts = field(default_factory=PageCounts)
    wire_bytes: int = 0
    resent_bytes: int = 0
    link_breaks: int = 0
    wire_rate_bytes_per_s: float = 0.0
    dirty_rate_pages_per_s: float = 0.0
    predicted_downtime_s: float = 0.0
    is_paused: bool = False
    because: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A migration that has ended, with every figure.

    `total_s` counts from the request until the guest's fate was known: it runs at the destination, or it was
    rolled back. `source_digest` is of all RAM at the source, read again page by page while the guest stood
    still there; None where that audit (`audit_s`, after the guest has left) was not asked for.
    `destination_digest` is what the destination had when the guest stopped. `runs_on` names the host that
    runs the guest now; None only when that is in doubt. `kept_pages` were at the destination already, from an
    earlier attempt, and not sent.
    """

    phase: Phase
    guest_id: str
    guest_name: str
    source: str
    destination: str
    runs_on: str | None
    error: str | None
    total_s: float
    downtime: DowntimeParts | None
    rounds: tuple[RoundStats, ...]
    counts: PageCounts
    ram_bytes: int
    wire_bytes: int
    resent_bytes: int
    link_breaks: int
    tracking: str
    source_digest: bytes | None
    destination_digest: bytes | None
    audit_s: float | None = None
    kept_pages: int = 0
