"""What the engine needs from outside, as Protocols: hypervisors, pages' way, journal, observers.

Law: no implementation. Each implementation passes the suite of the same name in tests/contracts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from migrate.facts import DiskFacts, GuestFacts, HostFacts, Objection, Survey
from migrate.ownership import Ownership
from migrate.phases import Phase
from migrate.preflight import Probe, Reading
from migrate.stats import Progress, RoundStats

# Rows of [first gfn, number of pages], sorted by gfn, neither empty nor overlapping: the unit of copying.
Runs = NDArray[np.int64]


class GuestRam(Protocol):
    """A guest's RAM as one space of pages numbered from 0 (gfn). All calls block; use worker threads."""

    @property
    def total_pages(self) -> int: ...

    def populated_runs(self) -> Runs:
        """The pages that may differ from zero; every other page is zero and was never touched.

        Never allocates memory in the guest: holes are asked of the file system, not read.
        """
        ...

    def gather(self, runs: Runs, out: memoryview) -> int:
        """Copy the pages of `runs`, in order, to the start of `out`; give the number of bytes."""
        ...

    def scatter(self, runs: Runs, pages: memoryview) -> None:
        """Write `pages` to `runs`, in order. Raises OutOfRam when the host cannot give the memory."""
        ...

    def scatter_zeros(self, runs: Runs) -> None:
        """Make every page of `runs` zero and give its memory back to the host."""
        ...

    def close(self) -> None:
        """Let go of the mapping. The guest keeps its RAM."""
        ...


class DirtyTracker(Protocol):
    """The log of a guest's writes. All calls block; use worker threads."""

    @property
    def method(self) -> str:
        """How writes are seen, for the log and the report: `uffd-wp`, `soft-dirty`, `write-hook`."""
        ...

    def start(self) -> None:
        """Begin with an empty log. Raises TrackerError: the guest is as before."""
        ...

    def harvest(self) -> Runs:
        """Take the pages written since start or the last harvest, and clear them.

        A page written while this runs is in this harvest or in the next, never in neither.
        Raises TrackerLost: the log has a gap, everything is dirty.
        """
        ...

    def stop(self) -> None:
        """Leave the guest as it was before start. May be called twice."""
        ...


# Take the next bytes of a guest's device state, in order. Does not wait.
DeviceStateSink = Callable[[bytes], None]


class SeenGuest(Protocol):
    """A guest at the source as a preflight needs it; it may be one that cannot be moved, and says why."""

    @property
    def facts(self) -> GuestFacts: ...

    async def release(self) -> None:
        """Let go of it. May be called twice."""
        ...


class RunningGuest(SeenGuest, Protocol):
    """A guest at the source. One migration at a time holds it."""

    @property
    def ram(self) -> GuestRam: ...
    @property
    def tracker(self) -> DirtyTracker: ...

    @property
    def discards(self) -> bool:
        """Whether it can give pages back to the host while it runs (a balloon, free-page reporting)."""
        ...

    def discarded_runs(self, among: Runs) -> Runs:
        """Give those pages of `among` that the paused guest has given back to the host: they read as zero now.

        A dirty log does not have them. Blocks; use worker threads.
        """
        ...

    async def drain(self) -> None:
        """Return when every write of a device to RAM that was under way has reached it; a paused guest has none.

        A page that a device had pinned before a harvest can receive its data after it, unlogged. So whoever copies
        pages clears the log, drains, and only then copies.
        """
        ...

    async def pause(self) -> float:
        """Stop all virtual CPUs and all devices' writes to RAM; give the seconds it stands by now.

        May be called twice.
        """
        ...

    async def prepare_switchover(self) -> None:
        """Do beforehand what `pause_for_switchover` can be spared; it runs on. May be called twice."""
        ...

    async def pause_for_switchover(self, send: DeviceStateSink) -> float:
        """Pause it to run elsewhere; what of its device state can travel before it stops is sent meanwhile."""
        ...

    async def resume(self) -> None:
        """Let it run again from where it was paused. May be called twice."""
        ...

    async def save_device_state(self, send: DeviceStateSink) -> None:
        """Send everything of the paused machine that is not RAM and was not sent yet, in order."""
        ...

    async def destroy(self) -> None:
        """End the paused guest for good: another host runs it now. May be called twice."""
        ...

    async def release(self) -> None:
        """Let go of the guest and leave it as it is (running or paused). May be called twice."""
        ...


class IncomingGuest(Protocol):
    """An empty machine at the destination, waiting for RAM and device state."""

    @property
    def ram(self) -> GuestRam: ...

    async def load_device_state(self, state: bytes) -> None:
        """Load it after the last page. Raises GuestRefused: the state does not fit this machine."""
        ...

    async def resume(self) -> None:
        """Run it. Raises GuestRefused only when certainly no instruction was executed."""
        ...

    async def destroy(self) -> None:
        """End it; nothing of it stays on this host. May be called twice."""
        ...

    async def release(self) -> None:
        """Let go of the running guest. May be called twice."""
        ...


class Hypervisor(Protocol):
    """One kind of guests on this host."""

    @property
    def name(self) -> str: ...

    async def host_facts(self, guest: GuestFacts | None = None) -> HostFacts:
        """What this host can give: to such a guest, where that differs from guest to guest."""
        ...

    async def objections(self, facts: GuestFacts) -> tuple[Objection, ...]:
        """Everything that this host's configuration and devices have against such a guest; changes nothing."""
        ...

    async def guests(self) -> list[GuestFacts]: ...

    async def open_guest(self, guest_id: str) -> RunningGuest:
        """Raises GuestUnknown, GuestRefused."""
        ...

    async def inspect_guest(self, guest_id: str) -> SeenGuest:
        """As `open_guest`, for a preflight alone: one that cannot be moved has `blockers`. Raises GuestUnknown."""
        ...

    async def prepare_incoming(self, facts: GuestFacts) -> IncomingGuest:
        """Make an empty, stopped machine for this guest. Raises GuestRefused with cause and remedy."""
        ...

    async def find_incoming(self, guest_id: str) -> IncomingGuest | None:
        """Give the machine that waits here with its device state loaded, after a restart of the agent."""
        ...


class HostSurvey(Protocol):
    """The host itself, whatever the hypervisor."""

    async def survey(self, guest: GuestFacts) -> Survey:
        """Look at this host with such a guest in mind; changes nothing. Facts of a guest are hostile."""
        ...


# Fill the buffer with the next payload and give its length; 0 when there are no more, transport.producer.NOT_YET when
# there is none now. Called from several worker threads at once. What was given is sent until it is acknowledged.
PayloadProducer = Callable[[memoryview], int]
# Take one opened payload. Called from several worker threads at once; it is acknowledged when this returns. Each comes
# once, however often it was sent: a delta that was applied twice would be none.
PayloadConsumer = Callable[[memoryview], None]


class PayloadSender(Protocol):
    """The data plane's sending side: several connections as one."""

    async def send_all(
        self,
        producer: PayloadProducer,
        *,
        payloads: int | None = None,
        on_given: Callable[[int], None] | None = None,
    ) -> None:
        """Send everything that the producer gives, `payloads` at most; return when all of it is acknowledged.

        Returning is the barrier between two rounds: whatever is sent next is newer everywhere. `on_given` hears, in the
        event loop and not later than that, when all has left: how many records the receiver has when it has it all.
        Raises PeerGone when the link stays broken for longer than the configured outage.
        """
        ...

    def more_to_send(self) -> None:
        """The producer, which gave NOT_YET, has something now. From any thread."""
        ...

    @property
    def wire_bytes(self) -> int:
        """Bytes given to the network so far, repeats included."""
        ...

    @property
    def acked_payload_bytes(self) -> int:
        """Bytes of payload that the peer has applied. From any thread."""
        ...

    @property
    def resent_bytes(self) -> int: ...
    @property
    def link_breaks(self) -> int: ...

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        """Cap all connections together from now on; None lifts the cap, 0 holds everything."""
        ...

    async def aclose(self) -> None:
        """Close all connections. May be called twice."""
        ...


class PayloadReceiver(Protocol):
    """The data plane's receiving side."""

    @property
    def data_port(self) -> int: ...
    @property
    def received_bytes(self) -> int: ...
    @property
    def failure(self) -> Exception | None:
        """What the consumer or a connection raised that ends the migration."""
        ...

    async def await_applied(self, records: int, within_s: float) -> bool:
        """Wait until the first `records` of all payloads are with the consumer; False: they were not in time."""
        ...

    async def aclose(self) -> None:
        """Close all connections; when this returns the consumer is called no more. May be called twice."""
        ...


class Caller(Protocol):
    """The control plane's asking side: a request reaches the other end once, or it is known that it may not."""

    async def call(self, request: object, *, timeout_s: float) -> object:
        """Ask and wait for the answer, through as many broken connections as the configuration allows.

        Raises:
            PeerRefused: the other end says no; it did nothing.
            PeerGone: no answer; `may_have_reached_peer` tells whether the request may have been obeyed.
            PeerMisbehaved: theirs; the session is dead.
        """
        ...


class Journal(Protocol):
    """What this agent has done, for after a restart: on disk when append() returns."""

    async def append(self, step: str, **facts: str | int | bytes | bool) -> None:
        """Raises JournalFailed: the step must not be made."""
        ...


class SharedStorage(Protocol):
    """The storage that both hosts see: nonces beside disks, and the ownership records."""

    async def plant(self, disks: Sequence[DiskFacts]) -> tuple[tuple[Probe, ...], dict[str, bytes]]:
        """Write a fresh nonce beside each disk that is a file, and lock it; choose what to compare of the disks.

        Disks where that fails have no nonce, and a probe that says why.
        """
        ...

    async def look(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        """Read what this host has planted, with what the other end has written into it; look at the disks."""
        ...

    async def read_probes(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        """Read what another host has planted, and write a nonce behind it; look at the disks. Paths are hostile."""
        ...

    async def clear(self, probes: Sequence[Probe]) -> None: ...

    async def ownership_dir(self, guest: GuestFacts) -> str:
        """Where the guest's ownership records belong. Raises StorageFailed."""
        ...

    async def check_ownership_dir(self, directory: str, guest: GuestFacts) -> str | None:
        """Say why this guest's records cannot be kept there, or None. All of it is hostile."""
        ...

    async def latest(self, directory: str, guest_id: str) -> Ownership | None:
        """Give the newest record. Raises StorageFailed, RecordInvalid."""
        ...

    async def claim(self, directory: str, wanted: Ownership) -> Ownership:
        """Create the record unless its generation is taken; give the one that stands now.

        The record is durable when this returns; it is ours exactly if it equals `wanted`.
        Raises StorageFailed: nobody knows whether it was created; NotRecorded: it was not, and will not be.
        """
        ...

    async def stage_claim(self, directory: str, wanted: Ownership) -> None:
        """Do beforehand what of a claim can be: while the guest stands still every write to the storage counts.

        Raises StorageFailed: a claim would fail as well.
        """
        ...

    async def unstage_claim(self, directory: str, wanted: Ownership) -> None:
        """Take back what was staged, if the claim was not made. May be called twice."""
        ...

    async def tidy(self, directory: str, guest_id: str) -> None:
        """Clear away records that are older than the newest few. Nothing depends on it."""
        ...


class Observer(Protocol):
    """Whoever watches a migration. Called on the event loop's thread; must not block or raise."""

    def phase_changed(self, old: Phase, new: Phase, because: str) -> None: ...

    def progressed(self, progress: Progress) -> None: ...

    def round_ended(self, round_stats: RoundStats) -> None: ...
