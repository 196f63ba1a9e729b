"""A world in memory: two hosts, one guest, shared storage, and links that break on purpose.

The procedures, the control session and its schema, the codec and the digests are the real ones; hypervisors,
storage, journal and the data plane are fakes that record what happened. `World.history` is what the safety
theorem is about: after every change, who runs the guest.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import anyio
import numpy as np
from numpy.typing import NDArray

from memory.bitmap import DirtyBitmap
from memory.layout import PAGE_BYTES
from memory.runs import Runs, empty_runs, expand, runs_of_mask
from migrate.controls import Controls
from migrate.destination import DestinationPorts, IncomingMigration
from migrate.errors import GuestRefused, GuestUnknown, JournalFailed, StorageFailed
from migrate.facts import (
    BlockFacts,
    CapacityFacts,
    CertificateFacts,
    Confinement,
    CpuFacts,
    DeviceFacts,
    DeviceKind,
    DiskFacts,
    GuestDemand,
    GuestFacts,
    GuestHardware,
    HostFacts,
    HostHardware,
    ImageFacts,
    MoveSlots,
    Objection,
    Permission,
    SecurityFacts,
    Survey,
)
from migrate.messages import MESSAGES, Prepare, Prepared, Running
from migrate.ownership import Ownership
from migrate.phases import Phase
from migrate.plan import Policy
from migrate.ports import DeviceStateSink, PayloadConsumer
from migrate.preflight import LockAnswer, Probe, Reading
from migrate.source import OutgoingMigration
from migrate.source_ports import SourcePorts, SourceSettings
from migrate.stats import Progress, Report, RoundStats
from tests.dataplane import Applied, Carrier
from tests.faults import Fuse, fused_stream_pair
from tests.waiting import delay
from transport.credit import Backoff
from transport.errors import PeerGone
from transport.schema import Schema
from transport.session import SESSION_SCHEMA, CallServer, CallSession
from transport.wire import MessageChannel

PAGES = 600
SCHEMA = Schema(*MESSAGES)
CPU = CpuFacts(
    model="Haswell", features=("avx", "sse2"), vendor="GenuineIntel", family=6, number=60, stepping=4
)
DISK = DiskFacts(
    name="disk0",
    path="/shared/guest.img",
    size_bytes=1 << 20,
    is_read_only=False,
    format="raw",
    cache="none",
)
# What every host sees of that disk.
IMAGE = ImageFacts(
    name="guest.img",
    size_bytes=1 << 20,
    allocated_bytes=1 << 20,
    virtual_bytes=1 << 20,
    digests=(b"first", b"last"),
    is_direct=True,
    file_system="nfs4",
    free_bytes=1 << 40,
    format="raw",
)
FACTS = GuestFacts(
    guest_id="11111111-2222-3333-4444-555555555555",
    name="guest",
    hypervisor="fake",
    is_running=True,
    machine="fake-1",
    blocks=(BlockFacts(name="ram", size_bytes=PAGES * PAGE_BYTES),),
    cpu=CPU,
    disks=(DISK,),
    spec=b"spec",
    demand=GuestDemand(vcpus=2),
    confinement=Confinement(),
    hardware=GuestHardware(
        version="1.0", devices=(DeviceFacts(name="disk0", type="fake-disk", kind=DeviceKind.EMULATED.value),)
    ),
)
CAPACITY = CapacityFacts(
    physical_bytes=4 << 30,
    swap_bytes=0,
    swap_free_bytes=0,
    online_cpus=4,
    load_5min=0.5,
    memory_pressure=0.0,
    cpu_pressure=1.0,
    promised_bytes=1 << 30,
    promised_vcpus=2,
    memory_overcommit=1.0,
    cpu_overcommit=16.0,
    moves=MoveSlots(
        incoming=0,
        incoming_limit=4,
        outgoing=0,
        outgoing_limit=4,
        is_draining=False,
        is_coming=False,
        is_leaving=False,
    ),
)
YEAR_S = 365 * 86400.0


def security(now_s: float) -> SecurityFacts:
    """A host without SELinux and AppArmor, whose certificates have a year to go."""
    return SecurityFacts(
        selinux=None,
        apparmor=None,
        certificates=CertificateFacts(
            own_ends_at_s=now_s + YEAR_S, ca_ends_at_s=now_s + 2 * YEAR_S, crl_ends_at_s=None
        ),
        permission=Permission(who="operator/tester", is_allowed=True),
    )


DIRECTORY = "/shared/.vmferry"


class ArrayRam:
    """GuestRam in an array."""

    def __init__(self, total_pages: int) -> None:
        self.pages: NDArray[np.uint8] = np.zeros((total_pages, PAGE_BYTES), np.uint8)

    @property
    def total_pages(self) -> int:
        return len(self.pages)

    def populated_runs(self) -> Runs:
        return runs_of_mask(np.asarray(self.pages.any(axis=1)))

    def gather(self, runs: Runs, out: memoryview) -> int:
        data = self.pages[expand(runs)].reshape(-1)
        out[: data.size] = data.data
        return int(data.size)

    def scatter(self, runs: Runs, pages: memoryview) -> None:
        self.pages[expand(runs)] = np.frombuffer(pages, np.uint8).reshape(-1, PAGE_BYTES)

    def scatter_zeros(self, runs: Runs) -> None:
        self.pages[expand(runs)] = 0

    def close(self) -> None:
        pass


class ForgetfulRam(ArrayRam):
    """RAM that loses what is written to it."""

    def scatter(self, runs: Runs, pages: memoryview) -> None:
        pass


@dataclass
class ScriptedTracker:
    """A dirty log that the test writes: before each harvest the guest writes the next script entry."""

    guest: FakeGuest
    method: str = "scripted"
    is_started: bool = False
    log: DirtyBitmap = field(default_factory=lambda: DirtyBitmap(PAGES))

    def start(self) -> None:
        self.is_started = True

    def harvest(self) -> Runs:
        self.guest.work()
        return self.log.take_runs()

    def stop(self) -> None:
        self.is_started = False


class SafetyWatch(Protocol):
    """The part of a world that its guests and hypervisors know."""

    hosts: dict[str, FakeHypervisor]
    destination_refuses_to_resume: bool
    spoils_ram: bool

    def record(self) -> None:
        """Called after every change of who runs what."""
        ...


class FakeGuest:
    """A guest that runs on one host. Its RAM changes only while it runs."""

    def __init__(self, world: SafetyWatch, host: str, facts: GuestFacts, *, is_running: bool) -> None:
        self.world = world
        self.host = host
        self.facts = facts
        self.ram = ArrayRam(PAGES)
        self.tracker = ScriptedTracker(self)
        self.state = b"registers"
        self.is_running = is_running
        self.rng = random.Random(7)
        self.dirty_per_round = [200, 60, 20, 5, 2]

    def work(self) -> None:
        """Write some pages, if it runs."""
        if not self.is_running:
            return
        count = self.dirty_per_round.pop(0) if self.dirty_per_round else 1
        self.write(self.rng.sample(range(PAGES), count))

    def write(self, gfns: Sequence[int]) -> None:
        for gfn in gfns:
            self.ram.pages[gfn, :8] = np.frombuffer(self.rng.randbytes(8), np.uint8)
        mask = np.zeros(PAGES, bool)
        mask[list(gfns)] = True
        self.tracker.log.mark(runs_of_mask(mask))

    discards = False

    def discarded_runs(self, among: Runs) -> Runs:
        return empty_runs()

    async def drain(self) -> None:
        pass

    async def pause(self) -> float:
        self.is_running = False
        self.world.record()
        return 0.0

    async def prepare_switchover(self) -> None:
        pass

    async def pause_for_switchover(self, send: DeviceStateSink) -> float:
        return await self.pause()

    async def resume(self) -> None:
        self.is_running = True
        self.world.record()

    async def save_device_state(self, send: DeviceStateSink) -> None:
        send(self.state)

    async def load_device_state(self, state: bytes) -> None:
        self.state = state

    async def destroy(self) -> None:
        self.is_running = False
        self.world.hosts[self.host].by_id.pop(self.facts.guest_id, None)
        self.world.record()

    async def release(self) -> None:
        pass


class IncomingFake(FakeGuest):
    """What prepare_incoming gives: it may refuse to start. Once it has run, it is a guest like any other."""

    has_run = False

    async def resume(self) -> None:
        if self.world.destination_refuses_to_resume and not self.has_run:
            raise GuestRefused("the machine does not start")
        self.has_run = True
        await super().resume()


class FakeHypervisor:
    """Guests of one host, in a dict."""

    name = "fake"

    def __init__(self, world: SafetyWatch, host: str) -> None:
        self.world = world
        self.host = host
        self.by_id: dict[str, FakeGuest] = {}
        self.free_memory_bytes = 1 << 30
        self.cpus = (CPU,)
        self.has_objections: tuple[Objection, ...] = ()

    async def host_facts(self, guest: GuestFacts | None = None) -> HostFacts:
        running = tuple(g.facts.guest_id for g in self.by_id.values() if not isinstance(g, IncomingFake))
        return HostFacts(
            name=self.host,
            hypervisor=self.name,
            cpus=self.cpus,
            machines=("fake-1",),
            free_memory_bytes=self.free_memory_bytes,
            guest_ids=running,
            hardware=HostHardware(version="1.0", device_types=("fake-disk",), memory_nodes=(0,)),
        )

    async def objections(self, facts: GuestFacts) -> tuple[Objection, ...]:
        return self.has_objections

    async def open_guest(self, guest_id: str) -> FakeGuest:
        if guest_id not in self.by_id:
            raise GuestUnknown(f"no guest {guest_id} on {self.host}")
        return self.by_id[guest_id]

    async def inspect_guest(self, guest_id: str) -> FakeGuest:
        return await self.open_guest(guest_id)

    async def guests(self) -> list[GuestFacts]:
        return [guest.facts for guest in self.by_id.values()]

    async def prepare_incoming(self, facts: GuestFacts) -> FakeGuest:
        guest = IncomingFake(self.world, self.host, facts, is_running=False)
        if self.world.spoils_ram:
            guest.ram = ForgetfulRam(PAGES)
        self.by_id[facts.guest_id] = guest
        return guest

    async def find_incoming(self, guest_id: str) -> FakeGuest | None:
        return None


@dataclass
class FakeStorage:
    """Shared storage; `failing_claims` of the next claims fail, before or after they took effect."""

    records: dict[int, Ownership] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    failing_claims: dict[str, list[str]] = field(default_factory=dict)
    staged: set[Ownership] = field(default_factory=set)

    def seen_from(self, host: str) -> StorageOfHost:
        return StorageOfHost(self, host)


@dataclass
class StorageOfHost:
    """The shared storage as one host sees it. `is_other_storage` makes its files another's."""

    shared: FakeStorage
    host: str
    is_other_storage: bool = False

    async def plant(self, disks: Sequence[DiskFacts]) -> tuple[tuple[Probe, ...], dict[str, bytes]]:
        probes, nonces = [], {}
        for disk in disks:
            path = f"{disk.path}.probe"
            nonces[disk.name] = self.shared.files[path] = random.randbytes(16)
            probes.append(
                Probe(disk=disk.name, path=path, image=disk.path, offsets=(0, 4096), is_locked=True)
            )
        return tuple(probes), nonces

    async def look(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        return tuple(self._reading(probe) for probe in probes)

    async def read_probes(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        return tuple(replace(self._reading(probe), lock=LockAnswer.REFUSED) for probe in probes)

    def _reading(self, probe: Probe) -> Reading:
        found = None if self.is_other_storage else self.shared.files.get(probe.path)
        error = None if found is not None else "no such file"
        return Reading(disk=probe.disk, content=found, error=error, image=IMAGE, echo=b"echo")

    async def clear(self, probes: Sequence[Probe]) -> None:
        for probe in probes:
            self.shared.files.pop(probe.path, None)

    async def ownership_dir(self, guest: GuestFacts) -> str:
        return DIRECTORY

    async def check_ownership_dir(self, directory: str, guest: GuestFacts) -> str | None:
        return None if directory == DIRECTORY else "not a shared directory"

    async def latest(self, directory: str, guest_id: str) -> Ownership | None:
        return self.shared.records[max(self.shared.records)] if self.shared.records else None

    async def claim(self, directory: str, wanted: Ownership) -> Ownership:
        failures = self.shared.failing_claims.get(self.host, [])
        failure = failures.pop(0) if failures else ""
        if failure == "before":
            raise StorageFailed("the storage does not answer")
        self.shared.staged.discard(wanted)
        latest = await self.latest(directory, wanted.guest_id)
        if latest is None or latest.generation < wanted.generation:
            self.shared.records[wanted.generation] = latest = wanted
        if failure == "after":
            raise StorageFailed("the storage did not say whether it did it")
        return latest

    async def stage_claim(self, directory: str, wanted: Ownership) -> None:
        self.shared.staged.add(wanted)

    async def unstage_claim(self, directory: str, wanted: Ownership) -> None:
        self.shared.staged.discard(wanted)

    async def tidy(self, directory: str, guest_id: str) -> None:
        for generation in sorted(self.shared.records)[:-3]:
            del self.shared.records[generation]


@dataclass
class FakeSurvey:
    """A host that is in order, but for its clock."""

    ahead_s: float = 0.0

    async def survey(self, guest: GuestFacts) -> Survey:
        at_s = anyio.current_time() + self.ahead_s
        return Survey(at_s=at_s, capacity=CAPACITY, security=security(at_s))


@dataclass
class FakeJournal:
    """Steps in a list; the step named `full_at` finds the disk full."""

    steps: list[str] = field(default_factory=list)
    full_at: str | None = None

    async def append(self, step: str, **facts: str | int | bytes | bool) -> None:
        if step == self.full_at:
            raise JournalFailed("no space left on device")
        self.steps.append(step)


@dataclass
class Watcher:
    """An observer that remembers."""

    changes: list[tuple[Phase, Phase, str]] = field(default_factory=list)
    rounds: list[RoundStats] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    at_phase: dict[Phase, Callable[[], None]] = field(default_factory=dict)

    def phase_changed(self, old: Phase, new: Phase, because: str) -> None:
        self.changes.append((old, new, because))
        self.at_phase.get(new, lambda: None)()

    def progressed(self, progress: Progress) -> None:
        self.progress.append(progress)

    def round_ended(self, round_stats: RoundStats) -> None:
        self.rounds.append(round_stats)


@dataclass
class InMemoryReceiver:
    """The other end of InMemorySender."""

    consumer: PayloadConsumer
    data_port: int = 7701
    received_bytes: int = 0
    failure: Exception | None = None
    is_closed: bool = False
    applied: Applied = field(default_factory=Applied)

    def take(self, number: int, payload: memoryview) -> None:
        self.consumer(payload)
        self.applied.is_new(number)

    async def await_applied(self, records: int, within_s: float) -> bool:
        return await self.applied.wait_for(records, within_s)

    async def aclose(self) -> None:
        self.is_closed = True


class InMemorySender(Carrier):
    """The data plane without a wire: each payload is one operation of the fuse, and a break sends it again.

    It is applied once all the same, as `ReceiveBundle` does.

    `bytes_per_s` is the link's rate in the loop's own time.
    """

    def __init__(self, receiver: InMemoryReceiver, fuse: Fuse, bytes_per_s: float | None = None) -> None:
        super().__init__()
        self.wire_bytes = 0
        self.acked_payload_bytes = 0
        self.resent_bytes = 0
        self.link_breaks = 0
        self.is_closed = False
        self.bandwidth: float | None = None
        self._receiver = receiver
        self._fuse = fuse
        self._bytes_per_s = bytes_per_s
        self._well = anyio.Event()
        self._well.set()
        # Somebody waits for a link that stalls.
        self.stands = anyio.Event()

    async def carry(self, number: int, payload: memoryview) -> None:
        size = len(payload)
        if not self._well.is_set():
            self.stands.set()
        await self._well.wait()
        if self._fuse.count():
            self.link_breaks += 1
            self.resent_bytes += size
            self.wire_bytes += size
        # One that arrived and whose acknowledgement was lost is sent again, and dropped there.
        self._receiver.take(number, payload)
        self.wire_bytes += size
        self.acked_payload_bytes += size
        await delay(size / self._bytes_per_s if self._bytes_per_s else 0)

    def stall(self) -> None:
        """From now on nothing arrives: what is under way is lost with whoever gives up waiting."""
        self._well = anyio.Event()

    def go_on(self) -> None:
        self._well.set()

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        self.bandwidth = bytes_per_s

    async def aclose(self) -> None:
        self.is_closed = True


class World:
    """Host `a` runs the guest; `migrate()` moves it to host `b`."""

    def __init__(self, fuse: Fuse | None = None, *, outage_s: float = 0.01) -> None:
        self.fuse = fuse or Fuse()
        self.outage_s = outage_s
        self.storage = FakeStorage()
        self.hosts = {name: FakeHypervisor(self, name) for name in ("a", "b")}
        self.history: list[tuple[bool, bool]] = []
        self.surveys = {"a": FakeSurvey(), "b": FakeSurvey()}
        self.journals = {"a": FakeJournal(), "b": FakeJournal()}
        self.watchers = {"a": Watcher(), "b": Watcher()}
        self.storages = {name: self.storage.seen_from(name) for name in ("a", "b")}
        self.destination_refuses_to_resume = False
        self.link_bytes_per_s: float | None = None
        self.link_is_down = anyio.Event()
        self.drops_replies_to: type | None = None
        self.controls = Controls(Policy(downtime_limit_s=0.3))
        self.sender: InMemorySender | None = None
        self.spoils_ram = False
        self.may_try_again = False
        self.source_task = anyio.CancelScope()
        guest = FakeGuest(self, "a", FACTS, is_running=True)
        guest.write(range(0, PAGES, 2))
        guest.tracker.log.clear()
        self.hosts["a"].by_id[FACTS.guest_id] = guest
        self.earlier: dict[str, IncomingMigration] = {}
        self.incoming = IncomingMigration("migration-1", self._destination_ports())

    # -- what the theorem is about

    def runs_at(self, host: str) -> bool:
        return any(guest.is_running for guest in self.hosts[host].by_id.values())

    def record(self) -> None:
        self.history.append((self.runs_at("a"), self.runs_at("b")))

    @property
    def guest(self) -> FakeGuest:
        """The guest as it was created, at the source."""
        return self.hosts["a"].by_id[FACTS.guest_id]

    # -- the two ends

    def become(self, destination: str) -> None:
        """Begin the destination's side anew, by this name and with the storage and journal that are there now."""
        self.incoming = IncomingMigration("migration-1", replace(self._destination_ports(), host=destination))

    def _destination_ports(self) -> DestinationPorts:
        async def open_receiver(request: Prepare, consumer: PayloadConsumer) -> InMemoryReceiver:
            self.receiver = InMemoryReceiver(consumer)
            return self.receiver

        return DestinationPorts(
            host="b",
            hypervisor=self.hosts["b"],
            storage=self.storages["b"],
            host_survey=self.surveys["b"],
            journal=self.journals["b"],
            observer=self.watchers["b"],
            open_receiver=open_receiver,
            earlier=self.earlier.get,
        )

    async def _handle(self, request: object) -> object:
        reply = await self.incoming.handle(request)
        if isinstance(reply, Running):
            await self.incoming.finish()
        if self.drops_replies_to is not None and isinstance(request, self.drops_replies_to):
            self.link_is_down.set()
            await anyio.sleep_forever()
        return reply

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[CallSession]:
        async with CallServer(SCHEMA) as server, anyio.create_task_group() as links:

            async def dial() -> MessageChannel:
                if self.link_is_down.is_set():
                    raise PeerGone("the link is down", may_have_reached_peer=False)
                near, far = fused_stream_pair(self.fuse)

                async def serve() -> None:
                    await server.serve(MessageChannel(far, SESSION_SCHEMA), self._handle)

                links.start_soon(serve)
                links.start_soon(cut_when_down, near)
                return MessageChannel(near, SESSION_SCHEMA)

            async def cut_when_down(stream: anyio.abc.ByteStream) -> None:
                await self.link_is_down.wait()
                await stream.aclose()

            session = CallSession(
                dial,
                SCHEMA,
                b"s" * 16,
                outage_s=self.outage_s,
                backoff=Backoff(0.001, 0.002, random.Random(1)),
            )
            try:
                yield session
            finally:
                await session.aclose()
                links.cancel_scope.cancel()

    async def migrate(self, policy: Policy | None = None, **changed: object) -> Report:
        """Run the source's procedure to its end, and insist that it gave a report."""
        report = await self.try_to_migrate(policy, **changed)
        if report is None:
            raise AssertionError("the source's task was cancelled")
        return report

    async def try_to_migrate(self, policy: Policy | None = None, **changed: object) -> Report | None:
        """As `migrate`; None when `source_task` was cancelled. `self.incoming` lives on."""
        if policy is not None:
            self.controls.policy = policy
        settings = SourceSettings(
            migration_id="migration-1", host="a", destination="b", call_timeout_s=5, commit_timeout_s=0.5
        )
        settings = replace(settings, **changed)  # type: ignore[arg-type]

        async with self._session() as session:

            async def open_sender(prepared: Prepared, secret: bytes) -> InMemorySender:
                self.sender = InMemorySender(self.receiver, self.fuse, self.link_bytes_per_s)
                return self.sender

            ports = SourcePorts(
                hypervisor=self.hosts["a"],
                caller=session,
                storage=self.storages["a"],
                host_survey=self.surveys["a"],
                journal=self.journals["a"],
                observer=self.watchers["a"],
                open_sender=open_sender,
                clock=anyio.current_time,
            )
            migration = OutgoingMigration(FACTS.guest_id, ports, settings, self.controls)
            with self.source_task:
                report = await migration.run()
                self.may_try_again = migration.may_try_again
                return report
            return None
