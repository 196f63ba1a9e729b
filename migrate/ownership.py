"""Who may run a guest: one record per generation, beside its disks.

Law: pure. A record is made by an atomic create-if-absent, so of all who want generation N+1 exactly one gets
it; whoever has the highest generation may run the guest, nobody else.

A destination says in two records how a move went: N+1 in its own name, the claim, and then N+2, in its own name when
the guest runs there, or in the source's when it could not and the guest is given back. Between the two a source that
has heard nothing keeps its stopped copy: it may be the only one.

Safety theorem: a host lets a guest run only (a) as it did before the migration, while it has not said COMMIT,
or (b) after its own record was created. Both ends want the same N+1, so never two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = [
    "MAX_RECORD_BYTES",
    "Ownership",
    "RecordInvalid",
    "Verdict",
    "format_record",
    "is_destinations",
    "next_generation",
    "parse_record",
    "record_name",
    "verdict_for_source",
]

MAX_RECORD_BYTES: Final = 1024  # four short lines; anything longer was not written by us
MAX_GENERATION: Final = 10**12  # twelve digits in the file name, so that names sort as numbers
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAGIC: Final = "vmferry-ownership 1"


class RecordInvalid(Exception):
    """A file on the shared storage that is no ownership record. Nobody is let run on its strength."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """`owner` runs the guest since `generation`; `migration_id` is the move that made it so."""

    guest_id: str
    generation: int
    owner: str
    migration_id: str


class Verdict(StrEnum):
    """What the records say to a source that does not know whether its COMMIT was obeyed."""

    SOURCE = "source"
    TAKEN = "taken"  # by the destination, which has not said yet whether it runs
    DESTINATION = "destination"
    UNDECIDED = "undecided"


def next_generation(current: Ownership, owner: str, migration_id: str) -> Ownership:
    """Give the record that `owner` must create to take the guest over."""
    return Ownership(
        guest_id=current.guest_id,
        generation=current.generation + 1,
        owner=owner,
        migration_id=migration_id,
    )


def verdict_for_source(latest: Ownership | None, claim: Ownership) -> Verdict:
    """Judge the newest record against the claim N+1 that the source would make.

    Nobody has made N+1 yet: undecided, and whoever makes it first wins. The source's name alone is not
    enough: the guest may have gone to the destination and come home since, and what stands still here is then
    an old copy. N+1 itself is the source's whichever migration made it so, for the guest has then never left; a later
    record gives it back only if it is of this very migration.
    """
    if latest is None or latest.generation < claim.generation:
        return Verdict.UNDECIDED
    is_of_this_copy = latest.generation == claim.generation or latest.migration_id == claim.migration_id
    if latest.owner == claim.owner and is_of_this_copy:
        return Verdict.SOURCE
    if (latest.generation, latest.migration_id) == (claim.generation, claim.migration_id):
        return Verdict.TAKEN
    return Verdict.DESTINATION


def is_destinations(latest: Ownership | None, claim: Ownership) -> bool:
    """Judge whether the newest record is the destination's `claim`, or the word that it said after it."""
    return (
        latest is not None
        and latest.generation >= claim.generation
        and (latest.owner, latest.migration_id) == (claim.owner, claim.migration_id)
    )


def record_name(guest_id: str, generation: int) -> str:
    """Give the record's file name; names of one guest sort by generation.

    Raises:
        RecordInvalid: the identity or number cannot be part of a file name. Theirs: it came from a peer.
    """
    if not _NAME.fullmatch(guest_id):
        raise RecordInvalid(f"guest identity {guest_id!r} cannot name a file")
    if not 0 < generation < MAX_GENERATION:
        raise RecordInvalid(f"generation {generation} is out of range")
    return f"{guest_id}.{generation:012d}"


def format_record(record: Ownership) -> bytes:
    """Give the bytes of a record: four lines that a person can read with `cat`."""
    for text in (record.guest_id, record.owner, record.migration_id):
        if not _NAME.fullmatch(text):
            raise RecordInvalid(f"{text!r} cannot stand in an ownership record")
    return (
        f"{_MAGIC}\nguest {record.guest_id}\ngeneration {record.generation}\n"
        f"owner {record.owner}\nmigration {record.migration_id}\n"
    ).encode()


def parse_record(data: bytes) -> Ownership:
    """Read a record back.

    Raises:
        RecordInvalid: torn or foreign.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise RecordInvalid(f"record of {len(data)} bytes")
    try:
        lines = data.decode("ascii").split("\n")
    except UnicodeDecodeError as exc:
        raise RecordInvalid("record is not text") from exc
    if len(lines) != 6 or lines[0] != _MAGIC or lines[5]:
        raise RecordInvalid("record is torn or foreign")
    values: list[str] = []
    for line, key in zip(lines[1:5], ("guest", "generation", "owner", "migration"), strict=True):
        word, _, value = line.partition(" ")
        if word != key or not _NAME.fullmatch(value):
            raise RecordInvalid(f"record has no {key}")
        values.append(value)
    if not values[1].isdecimal() or not 0 < int(values[1]) < MAX_GENERATION:
        raise RecordInvalid("record's generation is no number")
    return Ownership(guest_id=values[0], generation=int(values[1]), owner=values[2], migration_id=values[3])
