"""`vmferry agent run`: everything of one host agent, from its settings to its end.

Tasks, all in the group of `HostAgent.run`: the control, data and metrics listeners, the watches over incoming
migrations and over certificates, the ticker that measures the loop's lateness, the signal watcher, and one per
outgoing migration.

End: on SIGTERM or SIGINT no new migration begins and running ones may finish for DRAIN_S; then those that can
still be rolled back are, the others finish. A second signal rolls back at once. /healthz tells the state.
SIGHUP reads certificates and the revocation list again, which otherwise happens some seconds after they have changed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.abc
from anyio.streams.tls import TLSStream

from agents.api import CONTROL_SCHEMA, HostView
from agents.audit import AuditFile, Outcome
from agents.capabilities import keep_from_children
from agents.config import EventLoop, Settings
from agents.host.audittrail import AuditTrail
from agents.host.channels import Channels
from agents.host.control import ControlService
from agents.host.credentials import Credentials
from agents.host.data import DataListener
from agents.host.footprint import give_memory_back, settle
from agents.host.gate import Gate
from agents.host.incoming import Incoming
from agents.host.jobs import JobTable
from agents.host.outgoing import MIGRATION_SCHEMA, Outgoing
from agents.host.parts import HostParts
from agents.host.recovery import Recovery
from agents.httpd import Page, serve_pages
from agents.hypervisors.confinement import ROOT
from agents.hypervisors.embedded.driver import EmbeddedHypervisor
from agents.hypervisors.inhabitants import Inhabited
from agents.hypervisors.qemu.allowed import qemu_host
from agents.hypervisors.qemu.driver import QemuHypervisor
from agents.logs import get_logger, log_event
from agents.metrics import CONTENT_TYPE, AgentMetrics
from agents.ownership.place import EtcdPlace
from agents.secrecy import leave_no_core
from agents.storage import SharedDirs
from agents.survey.capacity import CapacitySurveyor
from agents.survey.host import HostSurveyor
from agents.survey.security import SecuritySurveyor
from agents.version import VERSION
from migrate.facts import CertificateFacts, MoveSlots
from migrate.ports import Hypervisor
from transport import limits as wire_limits
from transport.dial import peer_serial, serve
from transport.errors import TransportError
from transport.session import CallServer
from transport.tls import Identity, Role
from transport.wire import MessageChannel

if TYPE_CHECKING:
    from agents.ownership.etcd import EtcdRecords

__all__ = ["HostAgent", "run_agent"]

_log = get_logger(__name__)

DRAIN_S: Final = 60.0
TICK_S: Final = 0.01
IDLE_TICK_S: Final = 0.25
# While nothing moves. Heaps in pieces take a millisecond each time.
GIVE_BACK_EVERY_S: Final = 5.0
# Connections to etcd that do not end in time are left to the process's end.
CLOSE_S: Final = 2.0


class HostAgent:
    """One agent. `run` ends when it was told to end and all migrations have."""

    def __init__(self, settings: Settings, *, root: Path = ROOT) -> None:
        """`root` is where the kernel's /proc and /sys are looked for, by whoever surveys this host."""
        self._settings = settings
        hypervisors: dict[str, Hypervisor] = {}
        inhabited: list[Inhabited] = []
        if settings.embedded is not None:
            embedded = EmbeddedHypervisor(
                settings.embedded.dir,
                settings.agent.name,
                memory_limit_bytes=settings.embedded.memory_limit_bytes,
                disk_dirs=settings.shared_dirs,
                root=root,
            )
            hypervisors[embedded.name] = embedded
            inhabited.append(embedded)
        if settings.qemu is not None:
            qemu = QemuHypervisor(
                qemu_host(
                    settings.qemu, settings.shared_dirs, settings.shared_devices, settings.network_disks
                ),
                settings.agent.name,
                root=root,
            )
            hypervisors[qemu.name] = qemu
            inhabited.append(qemu)
        self._jobs = JobTable()
        self._metrics = AgentMetrics(settings.agent.name, VERSION)
        self._storage = SharedDirs(
            settings.shared_dirs,
            shared_devices=settings.shared_devices,
            network_disks=settings.network_disks,
            libvirt=settings.libvirt,
            etcd=_records_in(settings.etcd),
        )
        self._parts = HostParts(
            settings=settings,
            hypervisors=hypervisors,
            storage=self._storage,
            survey=HostSurveyor(
                capacity=CapacitySurveyor(settings.limits, inhabited, self._moves_besides, root=root),
                security=SecuritySurveyor(inhabited, self._certificates, root=root),
            ),
            jobs=self._jobs,
            metrics=self._metrics,
        )
        self._is_draining = False
        self._asked_to_end = anyio.Event()
        self._asked_twice = anyio.Event()
        self._credentials: Credentials | None = None

    def ask_to_end(self) -> None:
        """Drain, then end; asked again, roll back what can be at once."""
        if self._asked_to_end.is_set():
            self._asked_twice.set()
        self._asked_to_end.set()

    def reload(self) -> None:
        """Read certificates, key and revocation list again; the rest of the configuration stays."""
        if self._credentials is not None:
            self._credentials.ask_to_look()

    async def run(self, *, on_listening: Callable[[int, int, int], None] | None = None) -> None:
        """Serve until told to end. `on_listening` hears the control, data and metrics ports."""
        settings = self._settings
        self._credentials = Credentials(settings.tls, settings.agent.name, self._metrics)
        with contextlib.closing(
            DataListener(settings.agent.data_listen.host, settings.agent.data_listen.port)
        ) as data:
            try:
                await self._serve(data, self._credentials, on_listening)
            finally:
                with anyio.move_on_after(CLOSE_S, shield=True):
                    await self._storage.aclose()
        log_event(_log, logging.INFO, "agent ended", name=settings.agent.name)

    async def _serve(
        self,
        data: DataListener,
        credentials: Credentials,
        on_listening: Callable[[int, int, int], None] | None,
    ) -> None:
        settings = self._settings
        control = await _listen(settings.agent.listen.host, settings.agent.listen.port)
        pages = await _listen(settings.agent.metrics_listen.host, settings.agent.metrics_listen.port)
        recovery = Recovery(self._parts)
        to_go_on = await recovery.take_up()
        trail = AuditTrail(AuditFile(settings.agent.audit_log), self._metrics)
        gate = Gate(settings.access, trail)
        channels = Channels()
        if not settings.access.rules:
            log_event(
                _log,
                logging.WARNING,
                "every request is denied",
                because="the configuration has no [[allow]]",
                remedy="docs/configuration.md has rules to begin with",
            )

        def refused(address: str, error: TransportError) -> None:
            _log_refusal(address, error)
            trail.connection(Outcome.REFUSED, address, str(error))

        # The outer group holds what must go on while migrations end: listeners, and their answers.
        async with (
            control,
            pages,
            anyio.create_task_group() as services,
            CallServer(MIGRATION_SCHEMA, on_error=_log_bug) as server,
        ):
            async with anyio.create_task_group() as migrations:
                outgoing = Outgoing(
                    self._parts,
                    tls=credentials.client,
                    tasks=migrations,
                )
                incoming = Incoming(
                    self._parts,
                    server=server,
                    data=data,
                    tasks=migrations,
                    gate=gate,
                )
                # Before anybody is served: who watches a job must not take the attempt that was cut off for its end.
                for order in to_go_on:
                    await outgoing.go_on(order)
                service = ControlService(
                    outgoing=outgoing,
                    incoming=incoming,
                    jobs=self._jobs,
                    recovery=recovery,
                    host_view=self._view,
                    gate=gate,
                )

                async def serve_channel(stream: TLSStream, peer: Identity) -> None:
                    address = _address(stream)
                    try:
                        with channels.held(peer, address, peer_serial(stream)) as held:
                            if held.serial in credentials.revoked:
                                # The list came during its handshake.
                                held.scope.cancel()
                            channel = MessageChannel(
                                stream, CONTROL_SCHEMA, max_receive_bytes=wire_limits.MAX_REQUEST_BYTES
                            )
                            await service.serve(channel, peer, address)
                    except Exception as exc:
                        # A task's edge: what one channel meets must not end the agent.
                        _log_bug(exc)

                services.start_soon(
                    functools.partial(
                        serve,
                        control,
                        credentials.server,
                        serve_channel,
                        # Whoever this fleet's CA has given a role may ask; what is decided with the request.
                        accepts=channels.refusal,
                        on_refusal=refused,
                    )
                )

                async def cut_revoked() -> None:
                    for channel in channels.cut(credentials.revoked):
                        reason = f"the certificate of {channel.peer} was revoked"
                        trail.connection(Outcome.CUT, channel.address, reason, channel.peer)
                        if channel.peer.role is Role.AGENT:
                            await incoming.abandon_all(reason, of=channel.peer.name)
                    for host in outgoing.leave_revoked(credentials.revoked):
                        peer = Identity(role=Role.AGENT, name=host)
                        trail.connection(Outcome.CUT, "", f"the certificate of {peer} was revoked", peer)

                services.start_soon(credentials.watch, cut_revoked)
                services.start_soon(trail.run)
                services.start_soon(data.serve)
                services.start_soon(serve_pages, pages, {"/metrics": self._figures, "/healthz": self._health})
                services.start_soon(incoming.watch)
                services.start_soon(recovery.keep_settling)
                services.start_soon(self._tick)
                services.start_soon(self._keep_small)
                control_port, metrics_port = _port(control), _port(pages)
                log_event(
                    _log,
                    logging.INFO,
                    "agent listening",
                    name=settings.agent.name,
                    version=VERSION,
                    control=control_port,
                    data=data.port,
                    metrics=metrics_port,
                )
                if on_listening is not None:
                    on_listening(control_port, data.port, metrics_port)
                await self._asked_to_end.wait()
                await self._drain(outgoing, incoming)
            services.cancel_scope.cancel()

    async def _drain(self, outgoing: Outgoing, incoming: Incoming) -> None:
        self._is_draining = outgoing.is_draining = incoming.is_draining = True
        self._metrics.set_draining(True)
        log_event(_log, logging.INFO, "agent draining", running=self._running(), deadline_s=DRAIN_S)
        async with anyio.create_task_group() as waiting:

            async def cut_short() -> None:
                await self._asked_twice.wait()
                waiting.cancel_scope.cancel()

            waiting.start_soon(cut_short)
            with anyio.move_on_after(DRAIN_S):
                await self._until_idle()
            waiting.cancel_scope.cancel()
        outgoing.cancel_all("the agent at the source was shut down")
        await incoming.abandon_all("the agent at the destination was shut down")

    async def _until_idle(self) -> None:
        while running := [job for job in self._jobs if not job.has_ended]:
            await running[0].next_change().wait()

    def _running(self) -> int:
        return sum(1 for job in self._jobs if not job.has_ended)

    async def _tick(self) -> None:
        """Measure how late the event loop runs what is due; often only while something moves."""
        while True:
            pause_s = TICK_S if self._running() else IDLE_TICK_S
            due_s = anyio.current_time() + pause_s
            await anyio.sleep(pause_s)
            self._metrics.loop_was_late(max(anyio.current_time() - due_s, 0.0))

    async def _keep_small(self) -> None:
        """Give back what requests have left in the heaps; a migration does so itself at its end."""
        while True:
            await anyio.sleep(GIVE_BACK_EVERY_S)
            if not self._running():
                give_memory_back()

    def _moves_besides(self, guest_id: str) -> MoveSlots:
        return self._jobs.slots_besides(guest_id, self._settings.limits, is_draining=self._is_draining)

    def _certificates(self) -> CertificateFacts | None:
        return self._credentials.ends if self._credentials is not None else None

    def _view(self) -> HostView:
        limits = self._settings.limits
        return HostView(
            name=self._settings.agent.name,
            version=VERSION,
            is_draining=self._is_draining,
            hypervisors=tuple(self._parts.hypervisors),
            free_memory_bytes=0,
            guests=0,
            outgoing=len(self._jobs.running(is_outgoing=True)),
            outgoing_limit=limits.outgoing,
            incoming=len(self._jobs.running(is_outgoing=False)),
            incoming_limit=limits.incoming,
            peers=tuple(sorted(self._settings.peers)),
        )

    def _figures(self) -> Page:
        return Page(body=self._metrics.render(), content_type=CONTENT_TYPE)

    def _health(self) -> Page:
        if self._is_draining:
            return Page(body=b"draining\n", status=HTTPStatus.SERVICE_UNAVAILABLE)
        return Page(body=b"ok\n")


def run_agent(settings: Settings) -> None:
    """Run an agent on the configured event loop until a signal ends it."""
    settle()
    keep_from_children()
    leave_no_core()
    agent = HostAgent(settings)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            await group.start(_end_on_signals, agent)
            await agent.run()
            group.cancel_scope.cancel()

    if settings.agent.event_loop is EventLoop.TRIO:
        anyio.run(main, backend="trio")
    else:
        anyio.run(main, backend="asyncio", backend_options={"use_uvloop": _has_uvloop()})


async def _end_on_signals(
    agent: HostAgent, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            log_event(_log, logging.INFO, "signal", name=number.name)
            if number is signal.SIGHUP:
                agent.reload()
            else:
                agent.ask_to_end()


def _records_in(place: EtcdPlace | None) -> EtcdRecords | None:
    if place is None:
        return None
    # Not at the top: its HTTP client takes 6 MiB and 80 ms of hosts that have no etcd, too.
    from agents.ownership.etcd import EtcdRecords

    return EtcdRecords(place)


async def _listen(host: str, port: int) -> anyio.abc.Listener[anyio.abc.SocketStream]:
    return await anyio.create_tcp_listener(local_host=host, local_port=port)


def _port(listener: anyio.abc.Listener[anyio.abc.SocketStream]) -> int:
    port: int = listener.extra(anyio.abc.SocketAttribute.local_port)
    return port


def _address(stream: TLSStream) -> str:
    address = stream.extra(anyio.abc.SocketAttribute.remote_address, None)
    return str(address[0]) if isinstance(address, tuple) else ""


def _log_refusal(address: str, error: TransportError) -> None:
    log_event(_log, logging.WARNING, "connection refused", peer=address, cause=str(error))


def _log_bug(error: Exception) -> None:
    _log.error("a request or a channel failed inside this agent", exc_info=error)


def _has_uvloop() -> bool:
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return False
    return True
