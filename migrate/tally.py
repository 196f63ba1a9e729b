"""What a source notes down of its migration on the way, and the report made of it.

Law: notes only; nothing is decided by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrate.copying import Copier
from migrate.facts import GuestFacts
from migrate.phases import Phase
from migrate.source_ports import SourceSettings
from migrate.stats import DowntimeParts, PageCounts, Report

__all__ = ["Tally"]


@dataclass(slots=True)
class Tally:
    """Figures that are known at one moment and reported at the end; see `Report` for each."""

    tracking: str = ""
    kept_pages: int = 0
    downtime: DowntimeParts | None = None
    source_digest: bytes | None = None
    destination_digest: bytes | None = None
    audit_s: float | None = None

    def report(
        self,
        *,
        phase: Phase,
        guest_id: str,
        facts: GuestFacts | None,
        settings: SourceSettings,
        copier: Copier | None,
        error: str | None,
        total_s: float,
    ) -> Report:
        """Give the report of a migration that has ended in `phase`."""
        runs_on = {Phase.COMPLETE: settings.destination, Phase.ROLLED_BACK: settings.host}.get(phase)
        return Report(
            phase=phase,
            guest_id=guest_id,
            guest_name=facts.name if facts else guest_id,
            source=settings.host,
            destination=settings.destination,
            runs_on=runs_on,
            error=error,
            total_s=total_s,
            downtime=self.downtime,
            rounds=tuple(copier.rounds) if copier else (),
            counts=copier.counts if copier else PageCounts(),
            ram_bytes=facts.ram_bytes if facts else 0,
            wire_bytes=copier.sender.wire_bytes if copier else 0,
            resent_bytes=copier.sender.resent_bytes if copier else 0,
            link_breaks=copier.sender.link_breaks if copier else 0,
            tracking=self.tracking,
            audit_s=self.audit_s,
            kept_pages=self.kept_pages,
            source_digest=self.source_digest,
            destination_digest=self.destination_digest,
        )
