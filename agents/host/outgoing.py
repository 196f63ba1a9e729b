"""Outgoing migrations: from an operator's wish to a running procedure.

Tasks: one per migration, in the agent's task group. It ends by itself; the agent's drain cancels the migration
(which rolls back) and never the task.
"""

from __future__ import annotations

import logging
import random
import socket
import ssl
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import anyio
import anyio.abc
import anyio.to_thread

from agents.api import Check, CheckReport, Move
from agents.host.footprint import migration_ended
from agents.host.forecasts import Forecasts, Foretold, Unpredicted
from agents.host.jobs import Job
from agents.host.journals import LazyJournal
from agents.host.orders import Order
from agents.host.parts import HostParts
from agents.host.path import PathMeter
from agents.logs import get_logger, log_event
from agents.sections import Endpoint
from agents.survey.security import PermittedSurvey
from memory.codec import MAX_PAYLOAD_BYTES
from migrate.controls import Controls
from migrate.cpubaseline import HostCpus
from migrate.errors import (
    GuestBusy,
    GuestUnknown,
    JournalFailed,
    MigrationCancelled,
    MigrationError,
    SetupRefused,
)
from migrate.facts import GuestFacts, PathFacts, Permission
from migrate.forecast import Conditions
from migrate.inspection import Asker, dry_run
from migrate.messages import MESSAGES, Prepared
from migrate.phases import Phase, can_cancel
from migrate.plan import Policy
from migrate.source import OutgoingMigration
from migrate.source_ports import SourcePorts, SourceSettings
from migrate.stats import Report
from transport.bundle import SendBundle
from transport.credit import Backoff
from transport.dial import connect, peer_serial
from transport.hello import say_hello
from transport.schema import Schema
from transport.seal import Keys
from transport.session import SESSION_SCHEMA, CallSession
from transport.tls import Identity, Role
from transport.wire import MessageChannel

__all__ = ["MIGRATION_SCHEMA", "Draining", "Outgoing", "TooManyMigrations", "UnknownHost"]

_log = get_logger(__name__)

MIGRATION_SCHEMA: Final = Schema(*MESSAGES)
DIAL_TIMEOUT_S: Final = 10.0
# What a destination may take for an answer, however short the outages that are borne: it asks its storage, starts
# machines and looks at files; on a busy host that takes seconds. A link that is dead is noticed by itself.
MIN_CALL_TIMEOUT_S: Final = 15.0
FIRST_REDIAL_S: Final = 0.05
SLOWEST_REDIAL_S: Final = 2.0
# A move that a restart has cut off goes on without its operator.
WHO_ASKED: Final = "who asked for this move"


class UnknownHost(SetupRefused):
    """No [peers.NAME] of that name."""


class TooManyMigrations(SetupRefused):
    """The configured limit is reached."""


class Draining(SetupRefused):
    """The agent was told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    name: str
    address: Endpoint


class Outgoing:
    """Starts and follows this host's outgoing migrations."""

    def __init__(
        self,
        host: HostParts,
        *,
        tls: Callable[[], ssl.SSLContext],
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        self._host = host
        self._tls = tls
        self._tasks = tasks
        self.forecasts: Final = Forecasts(host)
        # By host: the serial number of the certificate that it had when it was called last.
        self._serials: dict[str, str] = {}
        limits = host.settings.limits
        self._meter = PathMeter(
            connections=limits.connections,
            window_bytes=limits.window_bytes,
            bandwidth_bytes_per_s=limits.bandwidth_bytes_per_s,
        )
        self.is_draining = False

    async def guests(self) -> list[GuestFacts]:
        """Give the guests of all hypervisors of this host."""
        found: list[GuestFacts] = []
        for hypervisor in self._host.hypervisors.values():
            found.extend(await hypervisor.guests())
        return found

    async def cpus(self) -> tuple[HostCpus, ...]:
        """Give the CPU models of all hypervisors of this host."""
        facts = [await hypervisor.host_facts() for hypervisor in self._host.hypervisors.values()]
        return tuple(
            HostCpus(host=one.name, hypervisor=one.hypervisor, cpus=one.cpus, cpu_host=one.cpu_host)
            for one in facts
        )

    async def check(self, request: Check, permission_for: Callable[[GuestFacts], Permission]) -> CheckReport:
        """Run the preflight of a move that is not made; measure its path and predict it where that is asked.

        `permission_for` tells whether who asks might make it.
        """
        to = request.to
        facts = await self._find(request.guest)
        peer = self._peer(to)
        session = self._session(peer, uuid.uuid4().bytes, outage_s=0.0)

        async def look_at_path(asker: Asker) -> PathFacts:
            return await self._meter.look(asker, peer.address.host, measures=request.measures)

        try:
            report, path = await dry_run(
                facts.guest_id,
                self._host.hypervisors[facts.hypervisor],
                session,
                self._host.storage,
                PermittedSurvey(self._host.survey, permission_for(facts)),
                source_host=self._host.settings.agent.name,
                destination=to,
                timeout_s=self._call_timeout_s,
                time_limit_s=self._host.settings.defaults.timeout_s,
                look_at_path=look_at_path,
            )
        finally:
            with anyio.CancelScope(shield=True):
                await session.aclose()
        checked = CheckReport(guest=facts.name, to=to, findings=report.findings, path=path)
        if request.predict_s <= 0:
            return checked
        wish = Move(
            guest=facts.guest_id,
            to=to,
            downtime_limit_s=request.downtime_limit_s,
            bandwidth_bytes_per_s=request.bandwidth_bytes_per_s,
        )
        conditions = self._conditions(
            wish, facts, to, goodput_bytes_per_s=path.goodput_bytes_per_s if path is not None else None
        )
        try:
            predicted = await self.forecasts.of_check(facts, conditions, request.predict_s)
        except Unpredicted as exc:
            return replace(checked, unpredicted=str(exc))
        return replace(checked, prediction=predicted)

    async def start(self, move: Move) -> Job:
        """Begin a move; it runs on in the agent.

        Raises:
            SetupRefused: before anything was done; the sentence says why.
        """
        if self.is_draining:
            raise Draining(f"{self._host.settings.agent.name} is being shut down and starts no more moves")
        peer = self._peer(move.to)
        facts = await self._find(move.guest)
        running = len(self._host.jobs.running(is_outgoing=True))
        if running >= self._host.settings.limits.outgoing:
            raise TooManyMigrations(
                f"{running} guests are leaving {self._host.settings.agent.name} already, the limit is "
                f"{self._host.settings.limits.outgoing} ([limits] outgoing); wait for one to end"
            )
        if (holder := self._host.jobs.of_guest(facts.guest_id)) is not None:
            raise GuestBusy(
                f"{facts.name} is being moved already by job {holder.job_id} (phase {holder.phase}); "
                f"`vmferry watch {holder.job_id[:8]}` follows it"
            )
        return self._begin(Order(job=uuid.uuid4().hex, move=move), facts, peer)

    async def go_on(self, order: Order) -> Job | None:
        """Begin the next attempt of a move that a restart of this agent has cut off; None: it cannot be any more."""
        try:
            return self._begin(order, await self._find(order.move.guest), self._peer(order.move.to))
        except MigrationError as exc:
            log_event(_log, logging.ERROR, "move not taken up again", job=order.job, cause=str(exc))
            return None

    def _begin(self, order: Order, facts: GuestFacts, peer: _Peer) -> Job:
        controls = Controls(self._policy(order.move))
        job = Job(
            job_id=order.job,
            guest_id=facts.guest_id,
            guest_name=facts.name,
            source=self._host.settings.agent.name,
            destination=peer.name,
            is_outgoing=True,
            metrics=self._host.metrics,
            controls=controls,
        )
        self._host.jobs.add(job)
        self._tasks.start_soon(self._run, job, controls, order, facts, peer)
        return job

    def cancel_all(self, because: str) -> None:
        """Roll back every migration that still can be; the others finish."""
        for job in self._host.jobs.running(is_outgoing=True):
            if job.controls is not None and can_cancel(job.controls.phase):
                job.controls.cancel(MigrationCancelled(because))

    def leave_revoked(self, revoked: frozenset[str]) -> list[str]:
        """Roll back what still can be of the moves to hosts whose certificates were revoked; give the hosts."""
        hosts = [name for name, serial in self._serials.items() if serial in revoked]
        for name in hosts:
            del self._serials[name]
        for job in self._host.jobs.running(is_outgoing=True):
            destination = job.view().destination
            if destination in hosts and job.controls is not None and can_cancel(job.controls.phase):
                job.controls.cancel(MigrationCancelled(f"the certificate of agent/{destination} was revoked"))
        return hosts

    async def _run(self, job: Job, controls: Controls, first: Order, facts: GuestFacts, peer: _Peer) -> None:
        report = None
        order: Order | None = first
        attempts = 0
        foretold: Foretold | None = None
        try:
            await self.forecasts.make_way(facts.guest_id)
            if first.attempt == 1:
                conditions = self._conditions(first.move, facts, peer.name, goodput_bytes_per_s=None)
                # Beside the move, which does not wait for it.
                foretold = Foretold()
                self._tasks.start_soon(self.forecasts.begin, job, conditions, foretold)
            while order is not None:
                # The first attempt has the job's own name, which operators see in both agents' logs.
                migration_id = order.job if order.attempt == 1 else uuid.uuid4().hex
                job.migration_id = migration_id
                attempts += 1
                report, may_try_again = await self._attempt(job, controls, order, facts, peer)
                order = order.again(migration_id) if may_try_again and not self.is_draining else None
        finally:
            job.ended(report, None if report else "the agent ended the migration")
            migration_ended()
            with anyio.CancelScope(shield=True):
                is_comparable = attempts == 1 and not controls.was_changed
                if foretold is not None:
                    await self.forecasts.ended(foretold, report, is_comparable=is_comparable)

    async def _attempt(
        self, job: Job, controls: Controls, order: Order, facts: GuestFacts, peer: _Peer
    ) -> tuple[Report, bool]:
        """Run one migration; also tell whether another one is worth it, where this one was not carried through."""
        settings, move, migration_id = self._host.settings, order.move, job.migration_id
        session = self._session(peer, bytes.fromhex(migration_id), outage_s=settings.limits.outage_s)
        journal = LazyJournal(settings.agent.state_dir, migration_id)

        async def open_sender(prepared: Prepared, secret: bytes) -> SendBundle:
            return self._sender(peer, prepared, secret, migration_id)

        migration = OutgoingMigration(
            facts.guest_id,
            SourcePorts(
                hypervisor=self._host.hypervisors[facts.hypervisor],
                caller=session,
                storage=self._host.storage,
                # It would not have begun otherwise.
                host_survey=PermittedSurvey(self._host.survey, Permission(who=WHO_ASKED, is_allowed=True)),
                journal=journal,
                observer=job,
                open_sender=open_sender,
            ),
            SourceSettings(
                migration_id=migration_id,
                host=settings.agent.name,
                destination=peer.name,
                connections=settings.limits.connections,
                window_bytes=settings.limits.window_bytes,
                delta_cache_bytes=settings.limits.delta_cache_bytes,
                compression=move.compression or settings.defaults.compression,
                call_timeout_s=self._call_timeout_s,
                commit_timeout_s=settings.limits.dead_peer_s,
                audit=move.audit,
                order=order.to_bytes(),
                resumes=order.resumes,
            ),
            controls,
        )
        report = None
        try:
            report = await migration.run()
            return report, migration.may_try_again
        finally:
            with anyio.CancelScope(shield=True):
                await session.aclose()
                try:
                    await journal.aclose(ended=report is None or report.phase is not Phase.IN_DOUBT)
                except JournalFailed as exc:
                    log_event(_log, logging.ERROR, "journal not ended", job=job.job_id, cause=str(exc))

    @property
    def _call_timeout_s(self) -> float:
        limits = self._host.settings.limits
        return max(limits.outage_s + limits.dead_peer_s, MIN_CALL_TIMEOUT_S)

    def _session(self, peer: _Peer, session_id: bytes, *, outage_s: float) -> CallSession:
        async def dial_control() -> MessageChannel:
            stream = await connect(
                peer.address.host,
                peer.address.port,
                self._tls(),
                expect=Identity(role=Role.AGENT, name=peer.name),
                timeout_s=min(DIAL_TIMEOUT_S, self._host.settings.limits.dead_peer_s),
            )
            self._serials[peer.name] = peer_serial(stream)
            return MessageChannel(stream, SESSION_SCHEMA)

        return CallSession(
            dial_control,
            MIGRATION_SCHEMA,
            session_id,
            outage_s=outage_s,
            dead_peer_s=self._host.settings.limits.dead_peer_s,
            backoff=Backoff(FIRST_REDIAL_S, SLOWEST_REDIAL_S, random.Random()),
        )

    def _sender(self, peer: _Peer, prepared: Prepared, secret: bytes, migration_id: str) -> SendBundle:
        keys = Keys(secret)
        session_id, hello_key = bytes.fromhex(migration_id), keys.hello
        timeout_s = min(DIAL_TIMEOUT_S, self._host.settings.limits.dead_peer_s)

        def dial_blocking(slot: int) -> socket.socket:
            sock = socket.create_connection((peer.address.host, prepared.data_port), timeout=timeout_s)
            try:
                say_hello(sock, session_id, slot, hello_key, timeout_s=timeout_s)
            except BaseException:
                sock.close()
                raise
            return sock

        async def dial_data(slot: int) -> socket.socket:
            return await anyio.to_thread.run_sync(dial_blocking, slot)

        def log_link(sentence: str) -> None:
            log_event(_log, logging.WARNING, "data link", job=migration_id, what=sentence)

        limits = self._host.settings.limits
        return SendBundle(
            dial_data,
            keys=keys,
            connections=limits.connections,
            window_bytes=limits.window_bytes,
            max_payload_bytes=MAX_PAYLOAD_BYTES,
            outage_s=limits.outage_s,
            dead_peer_s=limits.dead_peer_s,
            on_event=log_link,
        )

    def _policy(self, move: Move) -> Policy:
        defaults, limits = self._host.settings.defaults, self._host.settings.limits
        bandwidth = limits.bandwidth_bytes_per_s
        if move.bandwidth_bytes_per_s is not None:
            bandwidth = move.bandwidth_bytes_per_s or None
        return Policy(
            downtime_limit_s=move.downtime_limit_s or defaults.downtime_limit_s,
            timeout_s=(defaults.timeout_s if move.timeout_s is None else move.timeout_s) or 0.0,
            on_timeout=move.on_timeout or defaults.on_timeout,
            bandwidth_bytes_per_s=bandwidth,
            is_offline=move.is_offline,
        )

    def _conditions(
        self, move: Move, facts: GuestFacts, to: str, *, goodput_bytes_per_s: float | None
    ) -> Conditions:
        """Give what a prediction of a move depends on beside the guest's writes."""
        policy = self._policy(move)
        return Conditions(
            guest_id=facts.guest_id,
            guest_name=facts.name,
            hypervisor=facts.hypervisor,
            source=self._host.settings.agent.name,
            destination=to,
            ram_bytes=facts.ram_bytes,
            downtime_limit_s=float(policy.downtime_limit_s),
            timeout_s=float(policy.timeout_s),
            on_timeout=policy.on_timeout,
            bandwidth_bytes_per_s=(
                None if policy.bandwidth_bytes_per_s is None else float(policy.bandwidth_bytes_per_s)
            ),
            goodput_bytes_per_s=goodput_bytes_per_s,
            is_offline=policy.is_offline,
            compression=move.compression or self._host.settings.defaults.compression,
            audit=move.audit,
            delta_cache_bytes=self._host.settings.limits.delta_cache_bytes,
        )

    def _peer(self, name: str) -> _Peer:
        if name == self._host.settings.agent.name:
            raise UnknownHost(f"the guest is on {name} already: name another host")
        address = self._host.settings.peers.get(name)
        if address is None:
            here, known = (
                self._host.settings.agent.name,
                ", ".join(sorted(self._host.settings.peers)) or "none",
            )
            raise UnknownHost(
                f"{here} knows no host {name[:64]}: it knows {known}. Add [peers.{name[:64]}] "
                "to its configuration"
            )
        return _Peer(name=name, address=address)

    async def _find(self, guest: str) -> GuestFacts:
        here = self._host.settings.agent.name
        found = [facts for facts in await self.guests() if guest in (facts.guest_id, facts.name)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise GuestUnknown(f"no guest {guest[:64]} on {here}; `vmferry guests` lists them")
        raise GuestUnknown(
            f"{len(found)} guests on {here} are named {guest[:64]}: give the identity, one of "
            + ", ".join(facts.guest_id for facts in found)
        )
