"""What a preflight judges: the facts of both ends, and what was written at one and read at the other.

Law: values only. Everything that came from the destination is a peer's word; a check says what it needs of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from migrate.facts import GuestFacts, HostFacts, Objection, PathFacts, Survey

__all__ = ["MAX_NAMED", "RECORDS", "Denied", "Inspection", "Probe", "Reading", "named"]

# The "disk" of a probe that was put where the ownership records are, when that is beside no disk.
RECORDS: Final = "ownership records"
# Of a list in a sentence: enough to choose from, short enough to be read.
MAX_NAMED: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A file with a fresh nonce that the source has put beside a disk. `path` is where."""

    disk: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the destination found at a probe's path: the file's bytes, or why there were none."""

    disk: str
    content: bytes | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that one preflight judges.

    `source_host` is the source's name. `here` is what the source saw of its own host just before it asked, `there` what
    the destination saw of its own; `answer_s` is how long the answer took.
    `nonces` are what the source wrote for each disk, `readings` what the destination read there.
    `ownership_error` says why the destination could not keep an ownership record, if it could not. `objections` are
    the destination's driver's. `reserved_bytes` of the guest's RAM are at the destination already. `path` is what the
    source found of the way there, None where it did not look; `time_limit_s` what the move may take, 0 for any time.
    """

    guest: GuestFacts
    source_host: str
    host: HostFacts
    here: Survey
    there: Survey
    answer_s: float
    nonces: dict[str, bytes]
    readings: tuple[Reading, ...]
    ownership_error: str | None
    objections: tuple[Objection, ...] = ()
    reserved_bytes: int = 0
    path: PathFacts | None = None
    time_limit_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """What is left to judge where the destination's rules did not let the source ask: `reason` is its sentence."""

    guest: GuestFacts
    source_host: str
    here: Survey
    reason: str


def named(words: tuple[str, ...] | list[str], none: str = "none") -> str:
    """Give a list for a sentence, cut to what can be read."""
    shown = ", ".join(words[:MAX_NAMED])
    return f"{shown} and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else shown or none
