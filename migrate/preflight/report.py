"""What a check says: one finding each, and the report that they make together.

Law: pure. A check's words that are the same each time (what is asked, why it matters, what to do) stand once, in its
`Check`; docs/preflight.md is made of them. A finding repeats them, so that it can be read alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Check", "Finding", "PreflightReport", "Severity"]


class Severity(StrEnum):
    """How bad a finding is. `UNKNOWN`: the fact could not be had, and the move does not depend on it.

    What a move depends on and was not proved is refused, never unknown.
    """

    OK = "ok"
    WARNING = "warning"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's outcome: `found` is what was seen on each side, `remedy` is empty when all is well."""

    check: str
    severity: Severity
    asked: str
    found: str
    why: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question of the preflight. `check_id` is stable: jobs select by it."""

    check_id: str
    asked: str
    why: str
    remedy: str

    def ok(self, found: str) -> Finding:
        return self._finding(Severity.OK, found, "")

    def warning(self, found: str, remedy: str | None = None) -> Finding:
        return self._finding(Severity.WARNING, found, remedy)

    def refused(self, found: str, remedy: str | None = None) -> Finding:
        return self._finding(Severity.REFUSED, found, remedy)

    def unknown(self, found: str, remedy: str | None = None) -> Finding:
        return self._finding(Severity.UNKNOWN, found, remedy)

    def _finding(self, severity: Severity, found: str, remedy: str | None) -> Finding:
        return Finding(
            check=self.check_id,
            severity=severity,
            asked=self.asked,
            found=found,
            why=self.why,
            remedy=self.remedy if remedy is None else remedy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Give the findings that are as bad as that."""
        return tuple(finding for finding in self.findings if finding.severity is severity)

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each refusal."""
        return tuple(f"{f.found}. {f.remedy}" if f.remedy else f.found for f in self.of(Severity.REFUSED))

    @property
    def is_passed(self) -> bool:
        return not self.of(Severity.REFUSED)
