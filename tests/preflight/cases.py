"""What a case is: how it is provoked, and which findings it must lead to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from agents.api import CheckReport
from migrate.preflight import Severity
from tests.preflight.stage import Build

__all__ = ["CASES", "Case", "Outcome", "fits", "problem", "warned"]

Play = Callable[[Build], Awaitable[CheckReport]]
P = TypeVar("P", bound=Play)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`expected` are the ids that must be found with that severity; of refused ones these and no others."""

    name: str
    area: str
    play: Play
    severity: Severity = Severity.REFUSED
    expected: frozenset[str] = frozenset()

    @property
    def is_problem(self) -> bool:
        return bool(self.expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a check said of a case."""

    refused: frozenset[str]
    warned: frozenset[str]

    @classmethod
    def of(cls, report: CheckReport) -> Outcome:
        def ids(severity: Severity) -> frozenset[str]:
            return frozenset(one.check for one in report.findings if one.severity is severity)

        return cls(refused=ids(Severity.REFUSED), warned=ids(Severity.WARNING))

    def mistake(self, case: Case) -> str:
        """Say what of it is not as it must be; empty when all is."""
        if case.severity is Severity.WARNING:
            missing, false = case.expected - self.warned, self.refused
        else:
            missing, false = case.expected - self.refused, self.refused - case.expected
        words = [f"not found: {', '.join(sorted(missing))}"] if missing else []
        return "; ".join(words + ([f"falsely refused: {', '.join(sorted(false))}"] if false else []))


CASES: list[Case] = []


def problem(*expected: str) -> Callable[[P], P]:
    """Register a problem that must be refused with exactly these ids."""
    return _register(Severity.REFUSED, expected)


def warned(*expected: str) -> Callable[[P], P]:
    """Register a combination that may move, with at least these warnings."""
    return _register(Severity.WARNING, expected)


def fits(play: P) -> P:
    """Register a good combination: nothing may be refused."""
    return _register(Severity.REFUSED, ())(play)


def _register(severity: Severity, expected: tuple[str, ...]) -> Callable[[P], P]:
    def register(play: P) -> P:
        CASES.append(
            Case(
                name=play.__name__.replace("_", " "),
                area=play.__module__.rpartition(".")[2],
                play=play,
                severity=severity,
                expected=frozenset(expected),
            )
        )
        return play

    return register
