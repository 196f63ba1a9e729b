"""The preflight: every reason why a move would not do, found before the first page and once more at the end.

Law: pure, a file for each area. All checks run, always; each finding says what was asked, what was found on each side,
why it matters and what to do. A check that a move depends on and that could not be made is a refusal: what was not
proved is not believed.
"""

from __future__ import annotations

from typing import Final

from migrate.facts import GuestFacts
from migrate.preflight import capacity, cpu, devices, identity, machine, network, storage
from migrate.preflight.evidence import RECORDS, Inspection, Probe, Reading
from migrate.preflight.report import Check, Finding, PreflightReport, Severity

__all__ = [
    "AREAS",
    "RECORDS",
    "Check",
    "Finding",
    "Inspection",
    "PreflightReport",
    "Probe",
    "Reading",
    "Severity",
    "examine",
    "examine_unreached",
]

# In the order of the report. The name of an area is its module's.
AREAS: Final = (identity, machine, cpu, storage, devices, network, capacity)


def examine(inspection: Inspection) -> PreflightReport:
    """Run every check."""
    return PreflightReport(findings=tuple(finding for area in AREAS for finding in area.judge(inspection)))


def examine_unreached(guest: GuestFacts, *, source_host: str, host: str, cause: str) -> PreflightReport:
    """Judge what can be judged while the destination does not answer; every other check could not be made."""
    made = (network.unreached(source_host, host, cause), *devices.judge_blockers(guest, source_host))
    findings: list[Finding] = []
    for area in AREAS:
        for check in area.CHECKS:
            of_this = [finding for finding in made if finding.check == check.check_id]
            findings += of_this or [check.unknown(f"{host} was not reached: it could not be asked", "")]
    return PreflightReport(findings=tuple(findings))
