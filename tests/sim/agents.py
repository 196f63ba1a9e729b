"""Host agents of a world: the real tables of moves and sessions, journals and recovery, without sockets.

Law: what an agent decides is the product's: `Outgoing`, `Incoming` and `Recovery` as they are. Only how they reach
the other host is replaced: the control channel by a stream in memory, the data connections by `tests.sim.links`.

Tasks: one per host that starts agent after agent, one per life of an agent; tasks of a life that is over may linger
until they meet `step`, and have no effect.
"""

from __future__ import annotations

import math
import random
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import anyio
import anyio.abc

from agents.api import Move
from agents.authorization import AccessPolicy
from agents.config import AgentSettings, EventLoop, LimitSettings, LogFormat, LogLevel, MoveDefaults, Settings
from agents.config import TlsSettings as Certificates
from agents.host.data import DataListener
from agents.host.gate import Gate
from agents.host.incoming import Incoming
from agents.host.jobs import Job, JobTable
from agents.host.outgoing import MIGRATION_SCHEMA, Outgoing
from agents.host.parts import HostParts
from agents.host.recovery import Recovery
from agents.metrics import AgentMetrics, Direction, MigrationMetrics
from agents.sections import Endpoint
from migrate.compression import Compression
from migrate.errors import SetupRefused
from migrate.messages import Prepare, Prepared
from migrate.phases import Phase
from migrate.plan import OnTimeout
from migrate.ports import PayloadConsumer, PayloadReceiver
from migrate.stats import Report
from tests.faults import Fuse, fused_stream_pair
from tests.migrate.world import FakeSurvey
from tests.sim.faults import DEAD_PEER_S, OUTAGE_S, TheoremBroken
from tests.sim.links import LINK_BYTES_PER_S, SimReceiver, SimSender
from tests.sim.lives import LIFE, Crashed, Life, step
from tests.sim.storage import SimStorage
from transport.credit import Backoff
from transport.errors import PeerGone
from transport.session import SESSION_SCHEMA, Attach, CallServer, CallSession
from transport.wire import MessageChannel

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["SimAgent", "settings_of"]

# The world's guests all move at once; that an agent refuses more than its limit is tried elsewhere.
NO_LIMIT: Final = 64
# Quick enough that a restart hardly matters, or so slow that the other end gives up.
SHORTEST_DOWN_S: Final = 0.01


def settings_of(name: str, names: list[str], state_dir: Path) -> Settings:
    """What a host's configuration says; files and ports that it names are never opened."""
    nowhere, files = Endpoint("127.0.0.1", 1), Path("/nowhere")
    return Settings(
        agent=AgentSettings(
            name=name,
            listen=nowhere,
            data_listen=nowhere,
            metrics_listen=nowhere,
            state_dir=state_dir,
            audit_log=files,
            log_level=LogLevel.ERROR,
            log_format=LogFormat.TEXT,
            event_loop=EventLoop.TRIO,
        ),
        tls=Certificates(ca=files, certificate=files, key=files),
        access=AccessPolicy(host=name),
        peers={other: nowhere for other in names if other != name},
        shared_dirs=(),
        shared_devices=(),
        network_disks=(),
        libvirt="",
        etcd=None,
        embedded=None,
        qemu=None,
        limits=LimitSettings(
            outgoing=NO_LIMIT,
            incoming=NO_LIMIT,
            connections=1,
            window_bytes=4 << 20,
            delta_cache_bytes=64 << 20,
            bandwidth_bytes_per_s=None,
            outage_s=OUTAGE_S,
            dead_peer_s=DEAD_PEER_S,
            memory_overcommit=1e6,
            cpu_overcommit=1e6,
        ),
        defaults=MoveDefaults(
            downtime_limit_s=0.3,
            timeout_s=0.0,
            on_timeout=OnTimeout.SUSPEND,
            compression=Compression.ZSTD,
        ),
    )


class _OpenGate(Gate):
    """Rules are tried elsewhere: everybody may everything."""

    def __init__(self) -> None:
        pass

    def pass_or_refuse(self, *arguments: object, **named: object) -> None:
        pass


class _Figures(AgentMetrics):
    """Tells the world of every change of phase; there is nobody to read figures."""

    def __init__(self, agent: SimAgent) -> None:
        self._agent = agent

    def observe(self, job: str, guest: str, direction: Direction) -> MigrationMetrics:
        return cast(MigrationMetrics, _Series(self._agent, guest, direction))

    def ended(self, job: str, report: Report) -> None:
        life = LIFE.get()
        if report.source == self._agent.name and (life is None or not life.is_over):
            self._agent.world.move_ended(report.source, report.guest_id)


class _Series:
    def __init__(self, agent: SimAgent, guest: str, direction: Direction) -> None:
        self._tell: Callable[[Phase, Phase, str], None] = partial(
            agent.world.phase_changed, agent.name, guest, direction
        )

    def phase_changed(self, old: Phase, new: Phase, because: str) -> None:
        life = LIFE.get()
        if life is None or not life.is_over:
            self._tell(old, new, because)

    def progressed(self, progress: object) -> None:
        pass

    def round_ended(self, round_stats: object) -> None:
        pass


class _Session(CallSession):
    """Asks like the real one; its agent may die just before a question leaves, and just after it was answered."""

    async def call(self, request: object, *, timeout_s: float) -> object:
        what = type(request).__name__
        step(f"before asking {what}")
        reply = await super().call(request, timeout_s=timeout_s)
        step(f"after the answer to {what}")
        return reply


class _Outgoing(Outgoing):
    """Moves that reach other agents of the world."""

    def __init__(self, agent: SimAgent, life: Life, host: HostParts, tasks: anyio.abc.TaskGroup) -> None:
        super().__init__(host, tls=_no_certificates, tasks=tasks)
        self._agent = agent
        self._life = life

    def _session(self, peer: object, session_id: bytes, *, outage_s: float) -> CallSession:
        world, name = self._agent.world, str(getattr(peer, "name", ""))

        async def dial() -> MessageChannel:
            await anyio.sleep(0.001)
            step()
            link, other = world.link(self._agent.name, name), world.agents[name]
            if link.is_down or not other.is_serving:
                raise PeerGone(f"{name} cannot be reached", may_have_reached_peer=False)
            near, far = fused_stream_pair(Fuse())
            link.streams.append(near)
            self._life.streams.append(near)
            other.accept(MessageChannel(far, SESSION_SCHEMA), self._agent.name)
            other.life.streams.append(far)
            return MessageChannel(near, SESSION_SCHEMA)

        return _Session(
            dial,
            MIGRATION_SCHEMA,
            session_id,
            outage_s=outage_s,
            dead_peer_s=DEAD_PEER_S,
            backoff=Backoff(0.05, 2.0, random.Random(world.rng.random())),
        )

    def _sender(self, peer: object, prepared: Prepared, secret: bytes, migration_id: str) -> SimSender:  # type: ignore[override]
        world, name = self._agent.world, str(getattr(peer, "name", ""))
        rate = math.exp(world.rng.uniform(*map(math.log, LINK_BYTES_PER_S)))
        receiver = world.ports.get(prepared.data_port)
        return SimSender(receiver, world.link(self._agent.name, name), rate, world.rng)


class _Incoming(Incoming):
    """Sessions whose pages come over the world's links, and whose answers may be lost."""

    def __init__(
        self, agent: SimAgent, life: Life, host: HostParts, server: CallServer, tasks: anyio.abc.TaskGroup
    ) -> None:
        super().__init__(host, server=server, data=cast(DataListener, None), tasks=tasks, gate=_OpenGate())
        self._agent = agent
        self._life = life

    async def _handle(self, session_id: bytes, request: object, peer: str) -> object:
        world, what = self._agent.world, type(request).__name__
        step(f"before {what}")
        reply = await super()._handle(session_id, request, peer)
        step(f"after {what}")
        if world.happens(world.faults.lost_replies):
            world.tell(f"the reply of {self._agent.name} to {what} of {peer} is lost")
            world.lose(world.link(self._agent.name, peer))
        return reply

    def _listen_for(self, session_id: bytes, request: Prepare, consumer: PayloadConsumer) -> PayloadReceiver:
        return SimReceiver(self._agent.world, self._life, consumer)


def _no_certificates() -> ssl.SSLContext:
    raise AssertionError("nobody dials for real in here")


class SimAgent:
    """The agent of one host, through all its lives."""

    def __init__(self, world: World, name: str, settings: Settings) -> None:
        self.world = world
        self.name = name
        self.life = Life(name, world)
        self.jobs = JobTable()
        self._has_begun = False
        self._settings = settings
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._services: anyio.abc.TaskGroup | None = None

    @property
    def is_serving(self) -> bool:
        return self._has_begun and not self.life.is_over and not self.life.scope.cancel_called

    @property
    def state_dir(self) -> Path:
        return self._settings.agent.state_dir

    async def keep_running(self) -> None:
        """Start the agent, and start it again whenever it has ended; runs until cancelled."""
        world = self.world
        while True:
            life = self.life
            world.tasks.start_soon(self._live, life)
            await life.has_ended.wait()
            self._has_begun = False
            life.close_files()
            self.life, self.jobs = Life(self.name, world), JobTable()
            down_s = math.exp(
                world.rng.uniform(math.log(SHORTEST_DOWN_S), math.log(world.faults.longest_down_s))
            )
            if not world.is_settling:
                with anyio.move_on_after(down_s):
                    await world.settling.wait()
            world.tell(f"the agent of {self.name} is started again")

    def crash(self) -> None:
        """Die now."""
        self.life.end()

    def stop(self) -> None:
        """End as if told to: what can be rolled back is, and everything else is left to the next start."""
        self.life.scope.cancel()

    async def order(self, move: Move) -> Job | None:
        """Ask for a move, as an operator does; None when it is refused, or the agent dies over it."""
        if not self.is_serving or self._outgoing is None:
            return None
        token = LIFE.set(self.life)
        try:
            return await self._outgoing.start(move)
        except (SetupRefused, Crashed):
            return None
        finally:
            LIFE.reset(token)

    def accept(self, channel: MessageChannel, peer: str) -> None:
        """Serve one channel of another agent."""
        if self._services is not None:
            self._services.start_soon(self._serve, self.life, channel, peer)

    async def _serve(self, life: Life, channel: MessageChannel, peer: str) -> None:
        LIFE.set(life)
        try:
            first = await channel.receive()
            if isinstance(first, Attach) and self._incoming is not None:
                await self._incoming.serve(channel, first, peer, "")
        except PeerGone:
            pass

    async def _live(self, life: Life) -> None:
        LIFE.set(life)
        try:
            with life.scope:
                await self._run(life)
        except BaseException as exc:
            # What tasks of a dead agent say counts for nothing, and what they broke before is the world's to tell.
            if not life.is_over or isinstance(exc, TheoremBroken):
                raise
        finally:
            life.end()

    async def _run(self, life: Life) -> None:
        world, name = self.world, self.name
        parts = HostParts(
            settings=self._settings,
            hypervisors={"fake": world.hosts[name]},
            storage=SimStorage(world, name),
            survey=FakeSurvey(),
            jobs=self.jobs,
            metrics=_Figures(self),
        )

        def found_bug(error: Exception) -> None:
            if not life.is_over:
                world.found_bug(error)

        recovery = Recovery(parts)
        orders = await recovery.take_up()
        step()
        world.outcome.taken_up += len(list(self.jobs))
        async with (
            anyio.create_task_group() as services,
            CallServer(MIGRATION_SCHEMA, on_error=found_bug) as server,
            anyio.create_task_group() as migrations,
        ):
            outgoing = _Outgoing(self, life, parts, migrations)
            incoming = _Incoming(self, life, parts, server, migrations)
            self._outgoing, self._incoming, self._services = outgoing, incoming, services
            services.start_soon(incoming.watch)
            services.start_soon(recovery.keep_settling)
            self._has_begun = True
            for order in orders:
                world.outcome.gone_on += await outgoing.go_on(order) is not None
            await anyio.sleep_forever()
