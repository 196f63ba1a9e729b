"""The preflight: every reason why a move would not do, found before the first page and once more at the end.

Law: pure, a file for each area. All checks run, always; each finding says what was asked, what was found on each side,
why it matters and what to do. A check that a move depends on and that could not be made is a refusal: what was not
proved is not believed.
"""

from __future__ import annotations

from typing import Final

from migrate.preflight import (
    capacity,
    cpu,
    devices,
    identity,
    images,
    machine,
    network,
    security,
    sharing,
    storage,
)
from migrate.preflight.evidence import RECORDS, Inspection, LockAnswer, Probe, Reading, Unanswered
from migrate.preflight.report import Check, Finding, PreflightReport, Severity

__all__ = [
    "AREAS",
    "RECORDS",
    "Check",
    "Unanswered",
    "Finding",
    "Inspection",
    "LockAnswer",
    "PreflightReport",
    "Probe",
    "Reading",
    "Severity",
    "examine",
    "examine_alone",
]

# In the order of the report. The name of an area is its module's.
AREAS: Final = (identity, machine, cpu, storage, sharing, images, devices, network, capacity, security)


def examine(inspection: Inspection) -> PreflightReport:
    """Run every check."""
    return PreflightReport(findings=tuple(finding for area in AREAS for finding in area.judge(inspection)))


def examine_alone(unanswered: Unanswered) -> PreflightReport:
    """Judge what the source alone knows, where the destination gave no facts; every other check could not be made."""
    made = [
        finding for area in (network, devices, capacity, security) for finding in area.judge_alone(unanswered)
    ]
    why = "its rules deny it" if unanswered.is_denied else "it was not reached"
    findings: list[Finding] = []
    for area in AREAS:
        for check in area.CHECKS:
            of_this = [finding for finding in made if finding.check == check.check_id]
            findings += of_this or [check.unknown(f"{unanswered.host} could not be asked: {why}", "")]
    return PreflightReport(findings=tuple(findings))
