"""Evidence of a demo in which everything went well, to be spoiled in one place."""

from __future__ import annotations

import uuid
from dataclasses import replace

from agents.demo.guests import Look
from agents.demo.proof import Evidence, Standstill, judge
from agents.demo.run import Demo, Outcome
from migrate.phases import Phase
from migrate.stats import DowntimeParts, PageCounts, Report, RoundStats

GUEST_ID = str(uuid.UUID(int=1))
STANDSTILL = Standstill(instructions=9000, ram=b"r" * 32, device_state=b"state", disk=bytes(512))
REPORT = Report(
    phase=Phase.COMPLETE,
    guest_id=GUEST_ID,
    guest_name="demo",
    source="host-a",
    destination="host-b",
    runs_on="host-b",
    error=None,
    total_s=0.5,
    downtime=DowntimeParts(
        pause_s=0.001, last_pages_s=0.002, device_state_s=0.0001, load_s=0.003, resume_s=0.002
    ),
    rounds=(
        RoundStats(
            number=0,
            duration_s=0.2,
            sent_pages=1024,
            wire_bytes=1 << 20,
            dirty_pages=10,
            dirty_rate_pages_per_s=50.0,
            goodput_bytes_per_s=2e7,
        ),
    ),
    counts=PageCounts(zero_pages=3, zstd_pages=1021, delta_pages=300, zstd_bytes=500_000, delta_bytes=4096),
    ram_bytes=8 << 20,
    wire_bytes=1 << 20,
    resent_bytes=2048,
    link_breaks=4,
    tracking="uffd-wp",
    source_digest=b"\x01" * 16,
    destination_digest=b"\x01" * 16,
    audit_s=0.01,
)


def look(ticks: int, **changed: object) -> Look:
    """Give what a guest shows of itself after so many ticks."""
    seen = Look(
        ticks=ticks,
        work=ticks * 50,
        work_unit="instructions",
        written=ticks,
        errors=0,
        is_running=True,
        state="running",
    )
    return replace(seen, **changed)  # type: ignore[arg-type]


GOOD = Evidence(
    report=REPORT,
    at_source=look(100),
    arrived=look(150),
    later=look(180),
    source_has_ended=True,
    moved=STANDSTILL,
    unmoved=STANDSTILL,
    unmoved_s=0.25,
)


def outcome(evidence: Evidence = GOOD, *, asked_cuts: int = 2, cuts: int = 2) -> Outcome:
    """Give the outcome that this evidence makes."""
    return Outcome(
        demo=Demo(ram_bytes=8 << 20, dirty_bytes_per_s=20 << 20, link_cuts=asked_cuts),
        report=evidence.report,
        proof=judge(evidence),
        evidence=evidence,
        cuts=cuts,
        folder=None,
    )
