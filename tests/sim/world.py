"""Hosts, guests, links and storage in virtual time, with seeded faults; the theorem is checked at every change.

The procedures, the session and the planner are the real ones; what surrounds them is made of the pieces of
`tests.migrate.world`. Runs on trio's MockClock alone: everything in here that waits, waits in virtual time, and
worker threads are replaced by calls, because an autojumping clock would jump while a thread works.

Tasks: one per guest that moves it again and again, one per link that breaks and mends it, one that watches over
silent sources, and those of the procedures; all end with `World.run`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import anyio
import anyio.abc

from memory.codec import MAX_PAYLOAD_BYTES
from migrate.compression import Compression
from migrate.controls import Controls
from migrate.destination import DestinationPorts, IncomingMigration
from migrate.doubt import settle
from migrate.errors import InDoubt, SetupRefused, StorageFailed
from migrate.facts import DiskFacts, GuestFacts
from migrate.messages import Prepare, Prepared, Running
from migrate.ownership import Ownership, Verdict
from migrate.phases import TERMINAL, Phase
from migrate.plan import OnTimeout, Policy
from migrate.ports import PayloadConsumer, PayloadProducer
from migrate.preflight import Probe, Reading
from migrate.source import OutgoingMigration
from migrate.source_ports import SourcePorts, SourceSettings
from migrate.stats import Report
from tests.faults import Fuse, fused_stream_pair
from tests.migrate.world import (
    FACTS,
    IMAGE,
    PAGES,
    SCHEMA,
    FakeGuest,
    FakeHypervisor,
    FakeJournal,
    FakeStorage,
    FakeSurvey,
    InMemoryReceiver,
    StorageOfHost,
    Watcher,
)
from transport.credit import Backoff
from transport.errors import PeerGone
from transport.producer import NOT_YET
from transport.session import SESSION_SCHEMA, CallServer, CallSession
from transport.wire import MessageChannel

__all__ = ["Faults", "Outcome", "TheoremBroken", "World"]

OUTAGE_S: Final = 20.0
DEAD_PEER_S: Final = 5.0
# What a link carries between nothing and a slow afternoon; the guest's RAM compresses to some KB a round.
LINK_BYTES_PER_S: Final = (3e2, 3e4)
MIGRATION_ENDS_WITHIN_S: Final = 3600.0
# How many there are of each, at least and at most; moves of each guest.
HOSTS: Final = (2, 6)
GUESTS: Final = (1, 8)
MOVES: Final = (2, 4)


class TheoremBroken(AssertionError):
    """Two copies of a guest ran at once, or none is left where none may be missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What may go wrong. Rates are chances for each opportunity, from 0 to 1."""

    outages: bool = True
    longest_outage_s: float = 3 * OUTAGE_S
    lost_replies: float = 0.05
    storage: float = 0.05
    storage_outages: bool = True
    refused_resumes: float = 0.1
    levers: float = 0.5
    killed_sources: float = 0.1
    spoiled_ram: float = 0.02

    @classmethod
    def of_a_day(cls, rng: random.Random) -> Faults:
        """Days differ: on most, little fails, so that moves come as far as the switchover; on some, everything does."""
        scale = rng.choice([0.05, 0.2, 0.2, 1.0])
        usual = cls()
        return replace(
            usual,
            outages=rng.random() < 0.8,
            longest_outage_s=OUTAGE_S * rng.choice([0.5, 1.0, 3.0]),
            lost_replies=usual.lost_replies * scale,
            storage=usual.storage * scale,
            storage_outages=rng.random() < scale,
            refused_resumes=usual.refused_resumes * scale,
            killed_sources=rng.choice([0, usual.killed_sources]),
            spoiled_ram=usual.spoiled_ram * scale,
        )

    @classmethod
    def short_outages_only(cls) -> Faults:
        """Links that are back before anybody may give up."""
        return cls(
            longest_outage_s=0.8 * OUTAGE_S,
            lost_replies=0,
            storage=0,
            storage_outages=False,
            refused_resumes=0,
            levers=0,
            killed_sources=0,
            spoiled_ram=0,
        )


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one seed."""

    seed: int
    hosts: int = 0
    guests: int = 0
    moves: int = 0
    complete: int = 0
    rolled_back: int = 0
    in_doubt: int = 0
    killed: int = 0
    outages: int = 0
    virtual_s: float = 0.0
    story: list[str] = field(default_factory=list)


class Link:
    """The network between two hosts. `broken` is set while it is down."""

    def __init__(self) -> None:
        self.broken = anyio.Event()
        self.mended = anyio.Event()
        self.mended.set()

    @property
    def is_down(self) -> bool:
        return self.broken.is_set()

    def cut(self) -> None:
        self.broken.set()
        self.mended = anyio.Event()

    def mend(self) -> None:
        self.broken = anyio.Event()
        self.mended.set()


class SimSender:
    """The data plane: waits for a link that is down, and gives up after OUTAGE_S, as the real one does."""

    def __init__(self, consumer: PayloadConsumer, link: Link, bytes_per_s: float, rng: random.Random) -> None:
        self.wire_bytes = 0
        self.acked_payload_bytes = 0
        self.resent_bytes = 0
        self.link_breaks = 0
        self.send_wait_s = 0.0
        self._consumer = consumer
        self._link = link
        self._bytes_per_s = bytes_per_s
        self._rng = rng
        self._cap: float | None = None
        self._buffer = memoryview(bytearray(MAX_PAYLOAD_BYTES))
        self._more = anyio.Event()

    async def send_all(self, producer: PayloadProducer, *, payloads: int | None = None) -> None:
        while size := producer(self._buffer):
            if size == NOT_YET:
                await self._more.wait()
                self._more = anyio.Event()
                continue
            is_delivered = False
            while not is_delivered:
                await self._wait_for_link()
                rate = self._bytes_per_s if self._cap is None else min(self._bytes_per_s, self._cap)
                while rate <= 0:
                    await anyio.sleep(0.5)
                    rate = self._bytes_per_s if self._cap is None else min(self._bytes_per_s, self._cap)
                self.wire_bytes += size
                with anyio.move_on_after(size / rate) as under_way:
                    await self._link.broken.wait()
                if under_way.cancelled_caught:
                    is_delivered = True
                else:
                    # It may have arrived before the link broke; either way it is sent again.
                    self.link_breaks += 1
                    self.resent_bytes += size
                    if self._rng.random() < 0.5:
                        self._consumer(self._buffer[:size])
            self._consumer(self._buffer[:size])
            self.acked_payload_bytes += size

    def more_to_send(self) -> None:
        self._more.set()

    async def _wait_for_link(self) -> None:
        with anyio.move_on_after(OUTAGE_S) as waiting:
            await self._link.mended.wait()
        if waiting.cancelled_caught:
            raise PeerGone(f"no data connection worked for {OUTAGE_S:g} s")

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        self._cap = bytes_per_s

    async def aclose(self) -> None:
        """Nothing is open between two rounds."""


class SimStorage:
    """`migrate.ports.SharedStorage` of one host: a record for each guest, and failures before or after."""

    def __init__(self, world: World, host: str) -> None:
        self._world = world
        self._host = host

    def _of(self, guest_id: str) -> StorageOfHost:
        return self._world.records[guest_id].seen_from(self._host)

    async def _may_fail(self) -> None:
        await anyio.sleep(self._world.rng.uniform(0, 0.02))
        if self._world.storage_is_down or self._world.happens(self._world.faults.storage):
            raise StorageFailed("the storage does not answer")

    async def plant(self, disks: Sequence[DiskFacts]) -> tuple[tuple[Probe, ...], dict[str, bytes]]:
        nonces = {disk.name: self._world.rng.randbytes(16) for disk in disks}
        for disk in disks:
            self._world.files[f"{disk.path}.probe"] = nonces[disk.name]
        return tuple(
            Probe(disk=disk.name, path=f"{disk.path}.probe", image=disk.path) for disk in disks
        ), nonces

    async def look(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        return await self.read_probes(probes)

    async def read_probes(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        image = replace(IMAGE, digests=())
        return tuple(
            Reading(
                disk=probe.disk,
                content=self._world.files.get(probe.path),
                error=None,
                image=image,
                echo=b"echo",
            )
            for probe in probes
        )

    async def clear(self, probes: Sequence[Probe]) -> None:
        for probe in probes:
            self._world.files.pop(probe.path, None)

    async def ownership_dir(self, guest: GuestFacts) -> str:
        return f"/shared/{guest.guest_id}"

    async def check_ownership_dir(self, directory: str, guest: GuestFacts) -> str | None:
        return None

    async def latest(self, directory: str, guest_id: str) -> Ownership | None:
        await self._may_fail()
        return await self._of(guest_id).latest(directory, guest_id)

    async def claim(self, directory: str, wanted: Ownership) -> Ownership:
        await self._may_fail()
        standing = await self._of(wanted.guest_id).claim(directory, wanted)
        await self._may_fail()
        return standing

    async def stage_claim(self, directory: str, wanted: Ownership) -> None:
        await self._may_fail()

    async def unstage_claim(self, directory: str, wanted: Ownership) -> None:
        await self._may_fail()

    async def tidy(self, directory: str, guest_id: str) -> None:
        await self._may_fail()
        await self._of(guest_id).tidy(directory, guest_id)


@dataclass(slots=True, kw_only=True)
class _Move:
    """One migration under way, with both its ends."""

    migration_id: str
    guest_id: str
    source: str
    to: str
    controls: Controls
    incoming: IncomingMigration
    watcher: Watcher
    consumer: list[PayloadConsumer] = field(default_factory=list)
    heard_at_s: float = 0.0


class World:
    """Guests on hosts, some of each; `run` moves each guest several times and checks what is left."""

    def __init__(self, seed: int, faults: Faults, rng: random.Random) -> None:
        self.rng = rng
        self.faults = faults
        hosts, guests, moves = rng.randint(*HOSTS), rng.randint(*GUESTS), rng.randint(*MOVES)
        self.outcome = Outcome(seed=seed, hosts=hosts, guests=guests)
        self.names = [f"host-{number}" for number in range(hosts)]
        self.hosts = {name: FakeHypervisor(self, name) for name in self.names}
        self.files: dict[str, bytes] = {}
        self.records: dict[str, FakeStorage] = {}
        self.storage_is_down = False
        self.spoils_ram = False
        self.destination_refuses_to_resume = False
        self._moves = moves
        self._links = {
            frozenset((one, other)): Link() for one in self.names for other in self.names if one < other
        }
        self._under_way: list[_Move] = []
        self._in_doubt: set[str] = set()
        self._changed = anyio.Event()
        for number in range(guests):
            guest_id = f"guest-{number}"
            disk = DiskFacts(
                name="disk0", path=f"/shared/{guest_id}.img", size_bytes=1 << 20, is_read_only=False
            )
            facts = replace(FACTS, guest_id=guest_id, name=guest_id, disks=(disk,))
            self.records[guest_id] = FakeStorage()
            host = self.rng.choice(self.names)
            guest = FakeGuest(self, host, facts, is_running=True)
            guest.rng = random.Random(self.rng.random())
            guest.write(range(0, PAGES, 2))
            guest.tracker.log.clear()
            self.hosts[host].by_id[guest_id] = guest

    # -- the theorem

    def record(self) -> None:
        """Insist, after every change, that no guest runs twice."""
        self._changed.set()
        self._changed = anyio.Event()
        for guest_id in self.records:
            running = self.running_at(guest_id)
            if len(running) > 1:
                raise self._broken(f"{guest_id} runs on {' and '.join(running)}")

    def running_at(self, guest_id: str) -> list[str]:
        """The hosts that run a guest now."""
        return [
            name
            for name, host in self.hosts.items()
            if guest_id in host.by_id and host.by_id[guest_id].is_running
        ]

    def happens(self, chance: float) -> bool:
        return self.rng.random() < chance

    def _broken(self, sentence: str) -> TheoremBroken:
        story = "\n".join(self.outcome.story[-60:])
        return TheoremBroken(
            f"{sentence}\n{story}\nreplay: python -m tests.sim --seed {self.outcome.seed} --seeds 1"
        )

    def _tell(self, sentence: str) -> None:
        self.outcome.story.append(f"{anyio.current_time():10.3f} {sentence}")

    # -- one seed

    async def run(self) -> Outcome:
        """Live through the seed.

        Raises:
            TheoremBroken: with the story, and how to replay it.
        """
        started_s = anyio.current_time()
        async with anyio.create_task_group() as weather:
            if self.faults.outages:
                for ends, link in self._links.items():
                    weather.start_soon(self._break_and_mend, "-".join(sorted(ends)), link)
            if self.faults.storage_outages:
                weather.start_soon(self._fail_storage)
            weather.start_soon(self._watch_sources)
            async with anyio.create_task_group() as guests:
                for guest_id in self.records:
                    guests.start_soon(self._live, guest_id)
            # Whoever has been silent is given up by now.
            await anyio.sleep(2 * (OUTAGE_S + DEAD_PEER_S))
            weather.cancel_scope.cancel()
        self._check_the_end()
        self.outcome.virtual_s = anyio.current_time() - started_s
        return self.outcome

    def _check_the_end(self) -> None:
        for guest_id in self.records:
            running = self.running_at(guest_id)
            if guest_id in self._in_doubt:
                if running and running[0] != self._owner(guest_id):
                    raise self._broken(
                        f"{guest_id} is in doubt and runs on {running[0]}, which does not own it"
                    )
            elif len(running) != 1:
                raise self._broken(f"{guest_id} runs nowhere")
            elif (owner := self._owner(guest_id)) not in (None, running[0]):
                raise self._broken(f"{guest_id} runs on {running[0]} and belongs to {owner}")

    def _owner(self, guest_id: str) -> str | None:
        records = self.records[guest_id].records
        return records[max(records)].owner if records else None

    async def _break_and_mend(self, name: str, link: Link) -> None:
        while True:
            await anyio.sleep(self.rng.expovariate(1 / 30))
            length_s = self.rng.uniform(0.01, self.faults.longest_outage_s)
            self._tell(f"link {name} is down for {length_s:.1f} s")
            self.outcome.outages += 1
            link.cut()
            await anyio.sleep(length_s)
            link.mend()
            # Long enough for one question and its answer: outages without any gap are one long outage.
            await anyio.sleep(3)

    async def _fail_storage(self) -> None:
        while True:
            await anyio.sleep(self.rng.expovariate(1 / 20))
            self.storage_is_down = True
            length_s = self.rng.uniform(0.1, 15)
            self._tell(f"the storage is down for {length_s:.1f} s")
            await anyio.sleep(length_s)
            self.storage_is_down = False

    async def _watch_sources(self) -> None:
        while True:
            await anyio.sleep(1)
            for move in list(self._under_way):
                if anyio.current_time() - move.heard_at_s > OUTAGE_S + DEAD_PEER_S:
                    await move.incoming.abandon("the source is silent")
                    if move.incoming.phase in TERMINAL or move.incoming.phase is Phase.IN_DOUBT:
                        self._under_way.remove(move)

    async def _live(self, guest_id: str) -> None:
        for number in range(self._moves):
            await anyio.sleep(self.rng.uniform(0, 5))
            running = self.running_at(guest_id)
            if len(running) != 1:
                raise self._broken(f"{guest_id} runs nowhere, and nobody is in doubt")
            to = self.rng.choice([name for name in self.names if name != running[0]])
            move = self._prepare_move(f"{guest_id}-move-{number}", guest_id, running[0], to)
            report = await self._migrate(move)
            self._count(move, report)
            # What an operator's `resolve` does, until the storage answers.
            if report is not None and report.phase is Phase.IN_DOUBT and not await self._resolve(move):
                self._in_doubt.add(guest_id)
                return
            if report is not None and report.phase is Phase.COMPLETE and not self.running_at(guest_id):
                # The destination's claim stands, but it could not tell that it does: it is in doubt itself.
                if move.incoming.phase is not Phase.IN_DOUBT:
                    raise self._broken(
                        f"{guest_id} went to {to}, which does not run it: {move.incoming.phase}"
                    )
                self._in_doubt.add(guest_id)
                return
            await self._until_nothing_is_left(move)

    async def _until_nothing_is_left(self, move: _Move) -> None:
        """Wait until the loser's copy is gone: a source that was cut off leaves it until it is given up."""
        with anyio.move_on_after(4 * (OUTAGE_S + DEAD_PEER_S)) as waiting:
            while sum(move.guest_id in host.by_id for host in self.hosts.values()) > 1:
                await self._changed.wait()
        if waiting.cancelled_caught and move.incoming.phase is not Phase.IN_DOUBT:
            raise self._broken(f"a copy of {move.guest_id} was left behind by {move.migration_id}")
        if waiting.cancelled_caught:
            # The destination in doubt learns from the record that the guest is not its own.
            await self.hosts[move.to].by_id[move.guest_id].destroy()

    async def _resolve(self, move: _Move) -> bool:
        guest = self.hosts[move.source].by_id[move.guest_id]
        claim = Ownership(
            guest_id=move.guest_id,
            generation=max(self.records[move.guest_id].records),
            owner=move.source,
            migration_id=move.migration_id,
        )
        latest = self.records[move.guest_id].records[claim.generation]
        if latest.migration_id != move.migration_id:
            claim = replace(claim, generation=claim.generation + 1)
        for _ in range(10):
            try:
                verdict = await settle(SimStorage(self, move.source), "", claim)
            except InDoubt:
                continue
            self._tell(f"{move.migration_id} was resolved: {verdict}")
            if verdict is Verdict.SOURCE:
                await guest.resume()
            else:
                await guest.destroy()
            return True
        return False

    # -- one move

    def _prepare_move(self, migration_id: str, guest_id: str, source: str, to: str) -> _Move:
        rng = self.rng
        policy = Policy(
            downtime_limit_s=rng.choice([0.03, 0.3, 2.0]),
            timeout_s=rng.choice([0.0, 0.0, 0.0, 20.0]) if self.faults.levers else 0.0,
            # A guest that outruns its link is no outage's fault: there it is suspended, and the move goes on.
            on_timeout=rng.choice(list(OnTimeout)) if self.faults.levers else OnTimeout.SUSPEND,
            is_offline=self.happens(0.2),
        )
        watcher = Watcher()
        controls = Controls(policy)
        consumer: list[PayloadConsumer] = []

        async def open_receiver(request: Prepare, pages: PayloadConsumer) -> InMemoryReceiver:
            consumer.append(pages)
            return InMemoryReceiver()

        incoming = IncomingMigration(
            migration_id,
            DestinationPorts(
                host=to,
                hypervisor=self.hosts[to],
                storage=SimStorage(self, to),
                host_survey=FakeSurvey(),
                journal=FakeJournal(),
                observer=Watcher(),
                open_receiver=open_receiver,
                earlier=lambda migration_id: None,
            ),
        )
        guest = self.hosts[source].by_id[guest_id]
        guest.dirty_per_round = [rng.randrange(1, 300) for _ in range(rng.randrange(20))]
        self.outcome.moves += 1
        self._tell(f"{migration_id} begins: {source} to {to}, {policy}")
        return _Move(
            migration_id=migration_id,
            guest_id=guest_id,
            source=source,
            to=to,
            controls=controls,
            incoming=incoming,
            watcher=watcher,
            consumer=consumer,
            heard_at_s=anyio.current_time(),
        )

    async def _migrate(self, move: _Move) -> Report | None:
        """Run one migration to its end; None: the source's task was cancelled."""
        link = self._links[frozenset((move.source, move.to))]
        source_task = anyio.CancelScope()
        report: Report | None = None
        self._under_way.append(move)
        async with CallServer(SCHEMA) as server, anyio.create_task_group() as tasks:

            async def handle(request: object) -> object:
                move.heard_at_s = anyio.current_time()
                self.destination_refuses_to_resume = self.happens(self.faults.refused_resumes)
                self.spoils_ram = self.happens(self.faults.spoiled_ram)
                reply = await move.incoming.handle(request)
                if isinstance(reply, Running):
                    await move.incoming.finish()
                move.heard_at_s = anyio.current_time()
                if self.happens(self.faults.lost_replies):
                    self._tell(f"the reply to {type(request).__name__} of {move.migration_id} is lost")
                    link.cut()
                    await anyio.sleep(self.rng.uniform(0.1, 2 * OUTAGE_S))
                    link.mend()
                return reply

            async def dial() -> MessageChannel:
                await anyio.sleep(0.001)
                if link.is_down:
                    raise PeerGone("the link is down", may_have_reached_peer=False)
                near, far = fused_stream_pair(Fuse())

                async def serve() -> None:
                    await server.serve(MessageChannel(far, SESSION_SCHEMA), handle)

                async def cut(broken: anyio.Event) -> None:
                    await broken.wait()
                    await near.aclose()

                tasks.start_soon(serve)
                tasks.start_soon(cut, link.broken)
                return MessageChannel(near, SESSION_SCHEMA)

            async def pull_levers() -> None:
                await self._pull_levers(move)

            tasks.start_soon(pull_levers)
            tasks.start_soon(self._kill, move, source_task)
            session = CallSession(
                dial,
                SCHEMA,
                b"s" * 16,
                outage_s=OUTAGE_S,
                backoff=Backoff(0.05, 2.0, random.Random(self.rng.random())),
            )
            rate = math.exp(self.rng.uniform(*map(math.log, LINK_BYTES_PER_S)))

            async def open_sender(prepared: Prepared, secret: bytes) -> SimSender:
                return SimSender(move.consumer[0], link, rate, self.rng)

            migration = OutgoingMigration(
                move.guest_id,
                SourcePorts(
                    hypervisor=self.hosts[move.source],
                    caller=session,
                    storage=SimStorage(self, move.source),
                    host_survey=FakeSurvey(),
                    journal=FakeJournal(),
                    observer=move.watcher,
                    open_sender=open_sender,
                    clock=anyio.current_time,
                ),
                SourceSettings(
                    migration_id=move.migration_id,
                    host=move.source,
                    destination=move.to,
                    compression=Compression.ZSTD,
                    call_timeout_s=OUTAGE_S + DEAD_PEER_S,
                    commit_timeout_s=DEAD_PEER_S,
                ),
                move.controls,
            )
            try:
                with anyio.fail_after(MIGRATION_ENDS_WITHIN_S), source_task:
                    report = await migration.run()
            except TimeoutError as exc:
                raise self._broken(f"{move.migration_id} does not end") from exc
            await session.aclose()
            tasks.cancel_scope.cancel()
        link.mend()
        return report

    async def _pull_levers(self, move: _Move) -> None:
        rng, controls = self.rng, move.controls
        while self.happens(self.faults.levers):
            await anyio.sleep(rng.expovariate(1 / 10))
            try:
                match rng.randrange(4):
                    case 0:
                        self._tell(f"{move.migration_id} is paused")
                        controls.pause()
                        await anyio.sleep(rng.uniform(0, 30))
                        controls.resume()
                    case 1:
                        controls.set_limits(downtime_limit_s=rng.uniform(0.01, 5))
                    case 2:
                        controls.set_limits(bandwidth_bytes_per_s=rng.choice([0, 1e3, 1e5]))
                    case _:
                        if self.happens(0.3):
                            self._tell(f"{move.migration_id} is cancelled")
                            controls.cancel()
            except SetupRefused as exc:
                self._tell(f"refused: {exc}")

    async def _kill(self, move: _Move, source_task: anyio.CancelScope) -> None:
        if self.happens(self.faults.killed_sources):
            await anyio.sleep(self.rng.expovariate(1 / 3))
            self._tell(f"the source's task of {move.migration_id} is cancelled")
            source_task.cancel()

    def _count(self, move: _Move, report: Report | None) -> None:
        outcome = self.outcome
        if report is None:
            outcome.killed += 1
            self._tell(f"{move.migration_id} was killed; the destination is {move.incoming.phase}")
            return
        self._tell(f"{move.migration_id} ended {report.phase}: {report.error}")
        match report.phase:
            case Phase.COMPLETE:
                outcome.complete += 1
            case Phase.ROLLED_BACK:
                outcome.rolled_back += 1
            case _:
                outcome.in_doubt += 1
        ended_in = move.watcher.changes[-1][0] if move.watcher.changes else Phase.SETUP
        if (
            self.faults == Faults.short_outages_only()
            and report.phase is Phase.ROLLED_BACK
            and ended_in in (Phase.PREFLIGHT, Phase.PRECOPY)
        ):
            raise self._broken(
                f"an outage shorter than {OUTAGE_S:g} s ended {move.migration_id}: {report.error}"
            )
