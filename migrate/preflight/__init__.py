"""The preflight: every reason why a move would not do, found before the first page and once more at the end.

Law: pure, a file for each area. All checks run, always; each finding says what was asked, what was found on each side,
why it matters and what to do. A check that a move depends on and that could not be made is a refusal: what was not
proved is not believed.
"""

from __future__ import annotations

from typing import Final

from migrate.preflight import capacity, cpu, devices, identity, machine, network, security, storage
from migrate.preflight.evidence import RECORDS, Denied, Inspection, Probe, Reading
from migrate.preflight.report import Check, Finding, PreflightReport, Severity

__all__ = [
    "AREAS",
    "RECORDS",
    "Check",
    "Denied",
    "Finding",
    "Inspection",
    "PreflightReport",
    "Probe",
    "Reading",
    "Severity",
    "examine",
    "examine_denied",
]

# In the order of the report. The name of an area is its module's.
AREAS: Final = (identity, machine, cpu, storage, devices, network, capacity, security)


def examine(inspection: Inspection) -> PreflightReport:
    """Run every check."""
    return PreflightReport(findings=tuple(finding for area in AREAS for finding in area.judge(inspection)))


def examine_denied(denied: Denied) -> PreflightReport:
    """Run the checks that need no word of the destination, which refuses to give any: never passed."""
    return PreflightReport(
        findings=tuple(
            finding for area in (devices, capacity, security) for finding in area.judge_denied(denied)
        )
    )
