"""What the source asks and the destination answers during a migration. The source always asks.

Law: frozen values that `transport.schema` carries; no behaviour. Everything in a request is hostile to the
destination, everything in a reply is hostile to the source. A change here is a change of the wire format: it
bumps PROTOCOL, and N goes on talking to N-1.

    source                          destination
    Inspect      ->
                 <-  Inspected      facts and what was read at the probes (a dry run ends here)
    MeasurePath  ->                 in a dry run only
                 <-  PathOpened     a port for data connections, whose payloads are thrown away
    EndMeasure   ->
                 <-  MeasureEnded   no connection of it is left
    Prepare      ->
                 <-  Prepared       an empty machine waits; data connections may come
    Compare      ->                 only with a machine that an earlier attempt has left: what is there already?
                 <-  Compared       the hashes of pages where the two RAMs differ
    ... rounds of pages on the data connections, Ping/Pong meanwhile ...
    Arm          ->
                 <-  Armed          what a claim needs is on its disks: the guest may be stopped
    ... the last pages and the device state on the data connections ...
    Load         ->
                 <-  Loaded         digest equal, device state loaded: it could run
    Commit       ->                 from here on ownership decides
                 <-  Running        claimed and running
                  or CommitRefused  never claimed, or given back: the source goes on

    Abort        ->  at any time before Commit
                 <-  Aborted        nothing is left at the destination
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from migrate.facts import GuestFacts, HostFacts, Objection, Survey
from migrate.preflight import Probe, Reading

__all__ = [
    "DENIED",
    "MAX_COMPARED_GROUPS",
    "MAX_LOAD_WAIT_S",
    "MESSAGES",
    "PROTOCOL",
    "Abort",
    "Aborted",
    "Arm",
    "Armed",
    "Commit",
    "CommitRefused",
    "Compare",
    "Compared",
    "EndMeasure",
    "Inspect",
    "Inspected",
    "Load",
    "Loaded",
    "MeasureEnded",
    "MeasurePath",
    "PathOpened",
    "Ping",
    "Pong",
    "Prepare",
    "Prepared",
    "Running",
]

PROTOCOL: Final = 1
# A destination that waits for last pages answers nothing else. What is on its way then is a window of them at most.
MAX_LOAD_WAIT_S: Final = 30.0
# The code of a refusal by the destination's rules: it tells the source nothing of itself, not even in an Inspected.
DENIED: Final = "denied"
# Groups in one Compare: 1 GiB of RAM, whose answer has 2 MiB of hashes at most.
MAX_COMPARED_GROUPS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Ask for the facts that the preflight judges. Changes nothing at the destination, which writes into `probes` only.

    `resumes` is as in Prepare: what that attempt has there is there already.
    """

    protocol: int
    guest: GuestFacts
    probes: tuple[Probe, ...]
    ownership_dir: str
    resumes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """`reserved_bytes` of this guest's RAM are already there (not zero after Prepare)."""

    host: HostFacts
    survey: Survey
    objections: tuple[Objection, ...]
    readings: tuple[Reading, ...]
    ownership_error: str | None
    reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurePath:
    """Ask for a place to send noise to, over as many data connections as pages would take.

    `secret` (32 bytes) keys them. With `connections` 0 only the port is asked for. The destination bounds what it
    takes and for how long (`transport.limits`), and takes part in one measurement at a time: else `busy`.
    """

    protocol: int
    secret: bytes
    connections: int
    window_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PathOpened:
    """`data_port` as in Prepared. Its connections say hello for `data_session`; `limit_bytes` of records are taken.

    The measurement ends with EndMeasure, with the control connection, or by itself.
    """

    data_port: int
    data_session: bytes
    connections: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndMeasure:
    """No more noise comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureEnded:
    """`received_bytes` of records came, and nothing of them is left."""

    received_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Ask for an empty machine. `secret` (32 bytes) keys the data connections, `digest_key` the RAM digest.

    `resumes` names an earlier attempt of this source to move the guest there, which is over: whatever its machine
    has received need not be sent again. Empty where there was none.
    """

    protocol: int
    guest: GuestFacts
    source_host: str
    generation: int
    ownership_dir: str
    secret: bytes
    digest_key: bytes
    connections: int
    window_bytes: int
    resumes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """`data_port` takes the data connections, at the address that the control connection went to.

    `is_resumed`: the machine is that of the earlier attempt, with what it has.
    """

    data_port: int
    is_resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Digests of groups of the source's pages from `first_group` on (`memory.digest`), 16 bytes each."""

    first_group: int
    digests: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The groups, in order, whose digest is another one here, and the hashes of all their pages, 8 bytes each."""

    groups: tuple[int, ...]
    hashes: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Ask whether the destination still wants this migration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """`failure` is why the destination cannot go on, in its own words."""

    received_bytes: int
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """The guest will be stopped soon: do now what would cost downtime then. Asked before each stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Armed:
    """The journal there says that a claim may come, and the claim is prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """All of the stopped guest has left: the digest of its RAM, and how many bytes of device state it has.

    It overtakes the last payloads: the destination has all of them when it has `records` of the data plane's, and waits
    `within_s` for that at most.
    """

    digest: bytes
    state_bytes: int
    records: int
    within_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """`digest` is the destination's own, taken from its RAM."""

    digest: bytes
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The destination may claim the next generation and run the guest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The destination owns the guest and runs it."""

    claim_s: float
    resume_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRefused:
    """The destination does not own the guest and never will through this migration: the source goes on.

    Only the procedure itself says this. A destination that merely does not know the migration (any more) has
    not said it: it may have run the guest before it forgot.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """The source keeps the guest. `reason` is for the destination's log."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborted:
    """Nothing of the guest is left at the destination."""


MESSAGES: Final = (
    Inspect,
    Inspected,
    MeasurePath,
    PathOpened,
    EndMeasure,
    MeasureEnded,
    Prepare,
    Prepared,
    Compare,
    Compared,
    Ping,
    Pong,
    Arm,
    Armed,
    Load,
    Loaded,
    Commit,
    CommitRefused,
    Running,
    Abort,
    Aborted,
)
