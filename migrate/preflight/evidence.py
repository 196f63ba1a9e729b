"""What a preflight judges: the facts of both ends, and what was written at one and read at the other.

Law: values only. Everything that came from the destination is a peer's word; a check says what it needs of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from migrate.facts import GuestFacts, HostFacts, ImageFacts, Objection, PathFacts, Survey

__all__ = ["MAX_NAMED", "RECORDS", "Inspection", "LockAnswer", "Probe", "Reading", "Unanswered", "named"]

# The "disk" of a probe that was put where the ownership records are, when that is beside no disk.
RECORDS: Final = "ownership records"
# Of a list in a sentence: enough to choose from, short enough to be read.
MAX_NAMED: Final = 8


class LockAnswer(StrEnum):
    """What became of the destination's attempt to lock what the source holds locked."""

    UNTRIED = "untried"
    REFUSED = "refused"
    GRANTED = "granted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A file with a fresh nonce that the source has put beside a disk, and what it wants to know of the disk.

    `path` is where it is, or empty where there is none beside this disk; `error` says why then. `image` is the disk's
    own path, and `offsets` are where its sectors are compared. `is_locked`: the source holds a lock on the file.
    `is_read_only`: the disk need not be writable.
    """

    disk: str
    path: str
    image: str = ""
    offsets: tuple[int, ...] = ()
    is_locked: bool = False
    is_read_only: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an end found at a probe's path: the file's bytes, or why there were none; and at the disk's.

    `echo` is a nonce that the destination has written behind the source's, for the source to read; `echo_error` says
    why it has not. `lock` is what became of its attempt to lock the file, `lock_error` why that could not be tried.
    """

    disk: str
    content: bytes | None
    error: str | None
    image: ImageFacts | None = None
    echo: bytes = b""
    echo_error: str = ""
    lock: LockAnswer = LockAnswer.UNTRIED
    lock_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that one preflight judges.

    `source_host` is the source's name. `here` is what the source saw of its own host just before it asked, `there` what
    the destination saw of its own; `answer_s` is how long the answer took.
    `nonces` are what the source wrote for each disk, `readings` what the destination read there; `before` and `after`
    are what the source read there itself just before it asked and just after. `probes` are what it asked for.
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
    probes: tuple[Probe, ...] = ()
    before: tuple[Reading, ...] = ()
    after: tuple[Reading, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unanswered:
    """What is left to judge where the destination gave no facts, and the `reason` in words.

    `is_denied`: its rules did not let the source ask; else it was not reached.
    """

    guest: GuestFacts
    source_host: str
    host: str
    here: Survey
    reason: str
    is_denied: bool


def named(words: tuple[str, ...] | list[str], none: str = "none") -> str:
    """Give a list for a sentence, cut to what can be read."""
    shown = ", ".join(words[:MAX_NAMED])
    return f"{shown} and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else shown or none
