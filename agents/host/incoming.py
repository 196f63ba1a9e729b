"""Incoming migrations: sessions of source agents, and the watch over sources that fall silent.

Tasks: `watch` is one, in the agent's task group: it abandons migrations whose source has been silent for too
long. Handlers run in the CallServer's task group, data connections in the agent's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.abc

from agents.authorization import Action, GuestNames
from agents.host.data import DataListener, ListeningBundle
from agents.host.footprint import migration_ended
from agents.host.gate import Gate
from agents.host.jobs import Job
from agents.host.journals import LazyJournal
from agents.host.measurements import Measurements
from agents.host.parts import HostParts
from agents.logs import get_logger, log_event
from memory.codec import MAX_PAYLOAD_BYTES
from migrate.destination import DestinationPorts, IncomingMigration
from migrate.errors import JournalFailed
from migrate.messages import EndMeasure, Inspect, MeasurePath, Prepare, Running
from migrate.phases import TERMINAL, Phase
from migrate.ports import Hypervisor, PayloadConsumer, PayloadReceiver
from transport import limits as wire_limits
from transport.bundle import ReceiveBundle
from transport.errors import PeerRefused
from transport.seal import Keys
from transport.session import Attach, CallServer
from transport.tls import Identity, Role
from transport.wire import MessageChannel

__all__ = ["Incoming"]

_log = get_logger(__name__)

WATCH_EVERY_S: Final = 1.0
# After COMMIT was answered the session is kept for so long, for a source whose link broke just then.
KEEP_ANSWER_S: Final = 120.0


@dataclass(slots=True, kw_only=True)
class _Session:
    """One source's session: a migration, or a dry run that will never become one.

    While one of its `calls` is answered the source waits for us: it is not silent.
    """

    peer: str
    migration: IncomingMigration
    observer: _LateObserver
    journal: LazyJournal
    job: Job | None = None
    heard_at_s: float = 0.0
    received_bytes: int = 0
    calls: int = 0
    ended_at_s: float | None = None


class _LateObserver:
    """Passes on to the job once there is one: a dry run never makes one."""

    def __init__(self) -> None:
        self.job: Job | None = None

    def phase_changed(self, old: Phase, new: Phase, because: str) -> None:
        if self.job is not None:
            self.job.phase_changed(old, new, because)

    def progressed(self, progress: object) -> None:
        """The source has the figures."""

    def round_ended(self, round_stats: object) -> None:
        """The source has the figures."""


class Incoming:
    """Takes guests in."""

    def __init__(
        self,
        host: HostParts,
        *,
        server: CallServer,
        data: DataListener,
        tasks: anyio.abc.TaskGroup,
        gate: Gate,
    ) -> None:
        self._host = host
        self._gate = gate
        self._server = server
        self._data = data
        self._tasks = tasks
        self._measurements = Measurements(host.settings.agent.name, data, tasks)
        self._sessions: dict[bytes, _Session] = {}
        # Sessions whose channel has ended before a call came: whose, and when.
        self._uncalled: dict[bytes, tuple[str, float]] = {}
        self.is_draining = False

    async def serve(self, channel: MessageChannel, attach: Attach, peer: str, address: str) -> None:
        """Serve one control channel of the agent `peer` at `address` until it ends."""
        session_id = attach.session_id

        is_denied = False

        async def handle(request: object) -> object:
            nonlocal is_denied
            try:
                self._decide(request, peer, address)
            except PeerRefused:
                is_denied = True
                raise
            return await self._handle(session_id, request, peer)

        try:
            await self._server.serve(channel, handle, attach=attach, owner=peer)
        finally:
            await self._measurements.end(session_id, peer)
            # Also when the peer misbehaved or was cut: the server remembers only so many sessions.
            session = self._sessions.get(session_id)
            if session is None:
                if is_denied:
                    self._forget(session_id, peer)
                elif self._server.remembers(session_id, peer):
                    # Its first call may still come, on another channel; `watch` does not wait for it for ever.
                    self._uncalled[session_id] = (peer, anyio.current_time())
            elif session.peer == peer and session.job is None and session.migration.phase is Phase.SETUP:
                self._forget(session_id, peer)

    async def watch(self) -> None:
        """Abandon what nobody works on any more; runs until cancelled."""
        while True:
            await anyio.sleep(WATCH_EVERY_S)
            now_s = anyio.current_time()
            for session_id, session in list(self._sessions.items()):
                await self._look_at(session_id, session, now_s)
            patience_s = self._patience_s()
            for session_id, (peer, left_at_s) in list(self._uncalled.items()):
                if session_id in self._sessions or now_s - left_at_s > patience_s:
                    del self._uncalled[session_id]
                    if session_id not in self._sessions:
                        self._forget(session_id, peer)

    async def abandon_all(self, because: str, *, of: str | None = None) -> None:
        """Give up every migration that has not been committed; with `of` only those of that agent."""
        await self._measurements.end_all(of=of)
        for session in list(self._sessions.values()):
            if of in (None, session.peer):
                await session.migration.abandon(because)
                await self._settle(session)

    # ------------------------------------------------------------------ requests

    def _decide(self, request: object, peer: str, address: str) -> None:
        """Ask the rules whether the peer may bring this guest; all else in a session follows from that."""
        if isinstance(request, Inspect | Prepare):
            self._gate.pass_or_refuse(
                Identity(role=Role.AGENT, name=peer),
                address,
                Action.SEND_GUESTS,
                what=request.guest.name[: wire_limits.MAX_GUEST_NAME_CHARS],
                guest=GuestNames(name=request.guest.name, guest_id=request.guest.guest_id),
                source=peer,
                to=self._host.settings.agent.name,
                only_looks=isinstance(request, Inspect),
            )
        elif isinstance(request, MeasurePath):
            # About no guest: whoever may send any may measure.
            self._gate.pass_or_refuse(
                Identity(role=Role.AGENT, name=peer),
                address,
                Action.SEND_GUESTS,
                source=peer,
                to=self._host.settings.agent.name,
                only_looks=True,
            )

    async def _handle(self, session_id: bytes, request: object, peer: str) -> object:
        if isinstance(request, MeasurePath):
            if self.is_draining:
                raise PeerRefused(
                    "draining", f"{self._host.settings.agent.name} is being shut down and measures nothing"
                )
            return await self._measurements.begin(session_id, request, peer)
        if isinstance(request, EndMeasure):
            return await self._measurements.end(session_id, peer)
        hypervisor = self._hypervisor_for(request)
        session = self._sessions.get(session_id)
        if session is None:
            session = self._open(session_id, hypervisor, peer)
        session.heard_at_s = anyio.current_time()
        earlier = None
        if isinstance(request, Prepare):
            earlier = self._earlier(request.resumes, peer)
            self._admit(session_id, session, request, peer, earlier)
        session.calls += 1
        try:
            reply = await session.migration.handle(request)
        finally:
            session.calls -= 1
            session.heard_at_s = anyio.current_time()
            if session.migration.phase is not Phase.COMPLETE:
                await self._settle(session)
            if earlier is not None:
                await self._settle(earlier)
        if isinstance(reply, Running):
            # Beside the answer: the source waits for it with the guest's downtime.
            self._tasks.start_soon(self._finish, session)
        return reply

    def _hypervisor_for(self, request: object) -> Hypervisor:
        hypervisors = self._host.hypervisors
        if not hypervisors:
            name = self._host.settings.agent.name
            raise PeerRefused("refused", f"{name} runs no guests: its configuration has no [guests.KIND]")
        wanted = request.guest.hypervisor if isinstance(request, Inspect | Prepare) else ""
        # A guest of a kind that this host does not run is a finding of the preflight, not an error here.
        return hypervisors.get(wanted) or next(iter(hypervisors.values()))

    def _open(self, session_id: bytes, hypervisor: Hypervisor, peer: str) -> _Session:
        migration_id = session_id.hex()
        observer = _LateObserver()
        journal = LazyJournal(self._host.settings.agent.state_dir, migration_id)

        async def open_receiver(request: Prepare, consumer: PayloadConsumer) -> PayloadReceiver:
            return self._listen_for(session_id, request, consumer)

        def earlier(resumes: str) -> IncomingMigration | None:
            found = self._earlier(resumes, peer)
            return found.migration if found else None

        migration = IncomingMigration(
            migration_id,
            DestinationPorts(
                host=self._host.settings.agent.name,
                hypervisor=hypervisor,
                storage=self._host.storage,
                host_survey=self._host.survey,
                journal=journal,
                observer=observer,
                open_receiver=open_receiver,
                earlier=earlier,
            ),
        )
        session = _Session(
            peer=peer,
            migration=migration,
            observer=observer,
            journal=journal,
            heard_at_s=anyio.current_time(),
        )
        self._sessions[session_id] = session
        return session

    def _earlier(self, migration_id: str, peer: str) -> _Session | None:
        """Find the migration that a restarted source goes on with; somebody else's is none."""
        try:
            session = self._sessions.get(bytes.fromhex(migration_id)) if migration_id else None
        except ValueError:
            return None
        return session if session is not None and session.peer == peer else None

    def _admit(
        self, session_id: bytes, session: _Session, request: Prepare, peer: str, earlier: _Session | None
    ) -> None:
        """Let a migration begin, or refuse it before anything was done."""
        host, limits = self._host.settings.agent.name, self._host.settings.limits
        if request.source_host != peer:
            raise PeerRefused("refused", f"{peer} asks in the name of {request.source_host[:64]}")
        if session.job is not None:
            raise PeerRefused("order", "this session has a migration already")
        if self.is_draining:
            raise PeerRefused("draining", f"{host} is being shut down and takes no more guests")
        goes_on = earlier is not None and earlier.job is not None and not earlier.job.has_ended
        coming = len(self._host.jobs.running(is_outgoing=False)) - goes_on
        if coming >= limits.incoming:
            raise PeerRefused(
                "busy",
                f"{coming} guests are coming to {host} already, the limit is {limits.incoming} ([limits] incoming)",
            )
        holder = self._host.jobs.of_guest(request.guest.guest_id)
        if holder is not None and not (earlier is not None and holder is earlier.job):
            raise PeerRefused("busy", f"{host} works on that guest already, in job {holder.job_id}")
        session.job = session.observer.job = Job(
            job_id=session_id.hex(),
            guest_id=request.guest.guest_id,
            guest_name=request.guest.name,
            source=peer,
            destination=host,
            is_outgoing=False,
            metrics=self._host.metrics,
        )
        self._host.jobs.add(session.job)

    def _listen_for(self, session_id: bytes, request: Prepare, consumer: PayloadConsumer) -> PayloadReceiver:
        keys = Keys(request.secret)
        bundle = ReceiveBundle(
            keys=keys,
            consumer=consumer,
            window_bytes=min(max(request.window_bytes, MAX_PAYLOAD_BYTES), wire_limits.MAX_WINDOW_BYTES),
            max_payload_bytes=MAX_PAYLOAD_BYTES,
        )
        return ListeningBundle(self._data, session_id, keys.hello, bundle)

    # ------------------------------------------------------------------ ends

    async def _finish(self, session: _Session) -> None:
        try:
            await session.migration.finish()
        except JournalFailed as exc:
            log_event(
                _log, logging.ERROR, "journal not ended", job=session.migration.migration_id, cause=str(exc)
            )
        await self._settle(session)

    async def _settle(self, session: _Session) -> None:
        """Take note of an end, once."""
        phase, job = session.migration.phase, session.job
        if job is None or job.has_ended or (phase not in TERMINAL and phase is not Phase.IN_DOUBT):
            return
        session.ended_at_s = anyio.current_time()
        job.ended(None)
        migration_ended()
        try:
            await session.journal.aclose(ended=phase in TERMINAL)
        except JournalFailed as exc:
            log_event(_log, logging.ERROR, "journal not ended", job=job.job_id, cause=str(exc))

    async def _look_at(self, session_id: bytes, session: _Session, now_s: float) -> None:
        if session.ended_at_s is not None:
            if now_s - session.ended_at_s > KEEP_ANSWER_S:
                self._forget(session_id)
            return
        if session.migration.received_bytes != session.received_bytes:
            session.received_bytes = session.migration.received_bytes
            session.heard_at_s = now_s
        patience_s = self._patience_s()
        if session.calls or now_s - session.heard_at_s <= patience_s:
            return
        if session.job is None:
            self._forget(session_id)
            return
        await session.migration.abandon(f"the source was silent for {patience_s:g} s")
        await self._settle(session)

    def _patience_s(self) -> float:
        """How long nothing may be heard of a source."""
        return self._host.settings.limits.outage_s + self._host.settings.limits.dead_peer_s

    def _forget(self, session_id: bytes, owner: str | None = None) -> None:
        self._sessions.pop(session_id, None)
        self._server.forget(session_id, owner)
