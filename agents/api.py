"""What operators ask an agent, and what it answers: the language of the command line and of jobs.

Law: frozen values that `transport.schema` carries; no behaviour. One channel, one request at a time; each
request has one answer, but for Watch, which is answered with a JobView at every change until the job has ended.
Refused is the answer to any request that is not obeyed. A change here is a change of the wire format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from migrate.compression import Compression
from migrate.cpubaseline import HostCpus
from migrate.facts import GuestFacts, PathFacts
from migrate.phases import Phase
from migrate.plan import OnTimeout
from migrate.preflight import Finding
from migrate.stats import Progress, Report, RoundStats
from transport.schema import Schema
from transport.session import ENVELOPE_TYPES

__all__ = [
    "CONTROL_SCHEMA",
    "Cancel",
    "Check",
    "CheckReport",
    "CpuView",
    "Done",
    "GetCpus",
    "GetHost",
    "GuestList",
    "HostView",
    "JobList",
    "JobStarted",
    "JobView",
    "ListGuests",
    "ListJobs",
    "Move",
    "Pause",
    "Refused",
    "Resolution",
    "Resolve",
    "Resume",
    "SetLimits",
    "Watch",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetHost:
    """Ask for a HostView."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostView:
    """One agent. `peers` are the hosts that it can move guests to; limits are migrations at once."""

    name: str
    version: str
    is_draining: bool
    hypervisors: tuple[str, ...]
    free_memory_bytes: int
    guests: int
    outgoing: int
    outgoing_limit: int
    incoming: int
    incoming_limit: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetCpus:
    """Ask for a CpuView."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuView:
    """The CPU models that each hypervisor of this host can give, with the features that they have here."""

    hypervisors: tuple[HostCpus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListGuests:
    """Ask for a GuestList."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestList:
    """The guests that are on this host, running or paused."""

    host: str
    guests: tuple[GuestFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Ask for a CheckReport: the preflight of a move that is not made. `guest` is an identity or a name.

    With `measures` the source also sends noise over the data path for a second, to see what it carries.
    """

    guest: str
    to: str
    measures: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Every finding, good and bad; `path` is what was found of the way from the guest's host to the other."""

    guest: str
    to: str
    findings: tuple[Finding, ...]
    path: PathFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Start a move; answered with JobStarted. None is the agent's configured default.

    `bandwidth_bytes_per_s` 0 is no cap. With `audit` the source reads all RAM once more after the guest has
    left, as proof; that costs the guest nothing and the host some CPU.
    """

    guest: str
    to: str
    is_offline: bool = False
    downtime_limit_s: float | None = None
    bandwidth_bytes_per_s: int | None = None
    timeout_s: float | None = None
    on_timeout: OnTimeout | None = None
    compression: Compression | None = None
    audit: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted:
    """The move runs on in the agent, whether somebody watches or not."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListJobs:
    """Ask for a JobList."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """One migration, outgoing or incoming, as this agent knows it.

    `because` is the reason of the last change or decision. `report` stands when the job has ended; incoming
    jobs have none, the source has the figures. `started_at_s` is Unix time.
    """

    job: str
    is_outgoing: bool
    guest_id: str
    guest_name: str
    source: str
    destination: str
    phase: Phase
    has_ended: bool
    is_paused: bool
    started_at_s: float
    because: str
    progress: Progress
    rounds: tuple[RoundStats, ...] = ()
    report: Report | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobList:
    """Jobs that run and those that ended lately, oldest first."""

    host: str
    jobs: tuple[JobView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Follow a job: JobViews come at every change, the last one with `has_ended`."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLimits:
    """Change limits of a running job; None leaves one as it is, a bandwidth of 0 lifts the cap."""

    job: str
    downtime_limit_s: float | None = None
    bandwidth_bytes_per_s: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Hold a job's pre-copy; the guest runs on."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Let a paused pre-copy go on."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """End a job and roll it back; refused when COMMIT may have left."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The request was obeyed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolve:
    """Ask for a Resolution. Without `act` it only tells what is known; with it the record is asked and obeyed.

    `take` is a person's word that the destination, which has taken the guest and never said that it runs, is off.
    """

    job: str
    act: bool
    take: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What is known of a job in doubt.

    `record` is the newest ownership record in words; `verdict` what follows from it for this host; `runs_on`
    the host that runs the guest, None while that is not known.
    """

    job: str
    guest_name: str
    phase: Phase
    record: str
    verdict: str
    runs_on: str | None
    is_resolved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Not obeyed. `code` is for programs: unknown-job, unknown-guest, unknown-host, busy, draining, too-late,
    unreachable, internal-error, refused."""

    code: str
    text: str


# What a control channel speaks: the envelopes of a migration's session, or an operator's requests.
CONTROL_SCHEMA: Final = Schema(
    *ENVELOPE_TYPES,
    GetHost,
    HostView,
    GetCpus,
    CpuView,
    ListGuests,
    GuestList,
    Check,
    CheckReport,
    Move,
    JobStarted,
    ListJobs,
    JobList,
    JobView,
    Watch,
    SetLimits,
    Pause,
    Resume,
    Cancel,
    Done,
    Resolve,
    Resolution,
    Refused,
)
