"""What can go wrong around a migration, and whose fault it is.

AgentError
├── SettingsError         the operator's: nothing was started
│   ├── QuantityInvalid     ... one size, rate or duration cannot be read
│   ├── ConfigInvalid       ... a configuration file, with every mistake in it
│   └── HostUnknown         ... a host that the command line's configuration does not name
├── RequestRefused        an agent understood a request and did not obey it
├── NotFound              no guest or job of that name on any host that answered
├── Ambiguous             more than one guest or job of that name
├── PkiRefused            the operator's or the world's: no certificate or key was written or overwritten
└── JournalCorrupt        the world's: a journal is damaged before its end; it says where

What a procedure of `migrate` has to know of is in that package's tree: JournalFailed, StorageFailed. So are the
ends of a move, with the report: MoveRolledBack is a MigrationFailed, MoveInDoubt is an InDoubt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from migrate.errors import InDoubt, MigrationFailed

if TYPE_CHECKING:
    from migrate.stats import Report

__all__ = [
    "AgentError",
    "Ambiguous",
    "ConfigInvalid",
    "HostUnknown",
    "JournalCorrupt",
    "MoveInDoubt",
    "MoveRolledBack",
    "NotFound",
    "PkiRefused",
    "QuantityInvalid",
    "RequestRefused",
    "SettingsError",
]


class AgentError(Exception):
    """Base of this package's errors. `str()` is for the person at the terminal: cause, then remedy."""


class SettingsError(AgentError):
    """What the operator wrote cannot be used."""


class QuantityInvalid(SettingsError):
    """A size, rate or duration that cannot be read; the sentence says what one looks like."""


class ConfigInvalid(SettingsError):
    """A configuration file with mistakes. `problems` has one sentence for each, all of them."""

    def __init__(self, path: Path, problems: tuple[str, ...]) -> None:
        super().__init__(path, problems)
        self.path = path
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.path}: {self.problems[0]}"
        return "\n".join([f"{self.path}: {len(self.problems)} mistakes", *(f"  {p}" for p in self.problems)])


class PkiRefused(AgentError):
    """A certificate or key could not be made or read; what was there before is unchanged."""


class JournalCorrupt(AgentError):
    """A journal is damaged before its last record. What the agent did last is not known from it."""

    def __init__(self, path: Path, offset_bytes: int, reason: str) -> None:
        super().__init__(path, offset_bytes, reason)
        self.path = path
        self.offset_bytes = offset_bytes
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"journal {self.path} is damaged at byte {self.offset_bytes}: {self.reason}. "
            "Keep the file, look at both hosts which of them runs the guest, then move the file away"
        )


class HostUnknown(SettingsError):
    """The command line's configuration has no such host. `known` are those it has."""

    def __init__(self, host: str, known: tuple[str, ...]) -> None:
        super().__init__(host, known)
        self.host = host
        self.known = known

    def __str__(self) -> str:
        return (
            f"the configuration names no host {self.host!r}, only {', '.join(self.known)}; "
            f'add [hosts.{self.host}] with address = "HOST:7700"'
        )


class RequestRefused(AgentError):
    """Agent `host` understood and did not obey: nothing changed. `code` is for programs (see `api.Refused`)."""

    def __init__(self, host: str, code: str, text: str) -> None:
        super().__init__(host, code, text)
        self.host = host
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"{self.host} refuses: {self.text}"


class NotFound(AgentError):
    """No `kind` (guest or job) is called `wanted` on the hosts that answered.

    `asked` are all hosts that were asked, `unreachable` those that did not answer, with the reason: it may be
    on one of them.
    """

    def __init__(
        self, kind: str, wanted: str, asked: tuple[str, ...], unreachable: Mapping[str, str]
    ) -> None:
        super().__init__(kind, wanted, asked, unreachable)
        self.kind = kind
        self.wanted = wanted
        self.asked = asked
        self.unreachable = unreachable

    def __str__(self) -> str:
        answered = [host for host in self.asked if host not in self.unreachable]
        found = f"no {self.kind} {self.wanted!r} on {', '.join(answered) or 'any host'}"
        silent = [f"{host} did not answer: {reason}" for host, reason in self.unreachable.items()]
        return "\n".join([found, *silent]) if silent else f"{found}"


class Ambiguous(AgentError):
    """More than one `kind` (guest or job) is called `wanted`. `found` describes each, one phrase for one."""

    def __init__(
        self, kind: str, wanted: str, found: tuple[str, ...], unreachable: Mapping[str, str]
    ) -> None:
        super().__init__(kind, wanted, found, unreachable)
        self.kind = kind
        self.wanted = wanted
        self.found = found
        self.unreachable = unreachable

    def __str__(self) -> str:
        how = "by its identity" if self.kind == "guest" else "with more of its letters"
        silent = [f"{host} did not answer: {reason}" for host, reason in self.unreachable.items()]
        return "\n".join([f"{self.wanted!r} is not one {self.kind}; name it {how}:", *self.found, *silent])


class MoveRolledBack(MigrationFailed):
    """A move that ended where it began. `report` has every figure."""

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        return (
            f"{self.report.guest_name} was not moved: {self.report.error or 'rolled back'}. "
            f"It runs on {self.report.runs_on or self.report.source}"
        )


class MoveInDoubt(InDoubt):
    """A move of which nobody knows yet how it ended. `report` has every figure, `job` is what to resolve."""

    def __init__(self, job: str, report: Report) -> None:
        super().__init__(job, report)
        self.job = job
        self.report = report

    def __str__(self) -> str:
        return (
            f"nobody knows yet whether {self.report.guest_name} runs on {self.report.destination}: "
            f"{self.report.error or 'the last answer was lost'}. On {self.report.source} it stays stopped; "
            f"see `vmferry resolve {self.job}`"
        )
