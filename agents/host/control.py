"""The control listener: proves who calls, then serves agents' sessions and operators' requests.

Tasks: one per channel. It ends with its peer, after IDLE_S without a request of an operator, or with the agent.
Law: a certificate decides the language: an agent speaks sessions, an operator speaks `agents.api`, and neither
can speak the other's. What a peer sends that is neither costs it the connection, and nobody else anything.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import anyio

from agents.api import (
    Cancel,
    Check,
    CheckReport,
    CpuView,
    Done,
    GetCpus,
    GetHost,
    GuestList,
    HostView,
    JobList,
    JobStarted,
    ListGuests,
    ListJobs,
    Move,
    Pause,
    Refused,
    Resolution,
    Resolve,
    Resume,
    SetLimits,
    Watch,
)
from agents.authorization import Action, GuestNames
from agents.host.gate import UNKNOWN_GUEST, Gate, names_among
from agents.host.incoming import Incoming
from agents.host.jobs import Job, JobTable, UnknownJob
from agents.host.outgoing import Draining, Outgoing, TooManyMigrations, UnknownHost
from agents.host.pace import Pace
from agents.host.recovery import Recovery
from agents.logs import get_logger, log_event
from migrate.controls import Controls
from migrate.errors import GuestBusy, GuestUnknown, MigrationError, SetupRefused, TooLate
from transport import limits
from transport.errors import BadMessage, PeerGone, PeerMisbehaved, PeerRefused, TransportError
from transport.session import Attach
from transport.tls import Identity, Role
from transport.wire import MessageChannel

__all__ = ["ControlService"]

_log = get_logger(__name__)

IDLE_S: Final = 600.0
# A watcher sees at most so many views a second: progress comes more often than a person can read.
WATCH_PAUSE_S: Final = 0.1

_ACTIONS: Final[Mapping[type[object], Action]] = MappingProxyType(
    {
        Watch: Action.WATCH,
        SetLimits: Action.SET,
        Pause: Action.PAUSE,
        Resume: Action.RESUME,
        Cancel: Action.CANCEL,
        Resolve: Action.RESOLVE,
    }
)

_CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (UnknownJob, "unknown-job"),
    (UnknownHost, "unknown-host"),
    (GuestUnknown, "unknown-guest"),
    (GuestBusy, "busy"),
    (TooManyMigrations, "busy"),
    (Draining, "draining"),
    (TooLate, "too-late"),
    (SetupRefused, "refused"),
    (MigrationError, "refused"),
    (PeerRefused, "refused"),
    (TransportError, "unreachable"),
)


class ControlService:
    """Answers on channels whose peers have proved who they are."""

    def __init__(
        self,
        *,
        outgoing: Outgoing,
        incoming: Incoming,
        jobs: JobTable,
        recovery: Recovery,
        host_view: Callable[[], HostView],
        gate: Gate,
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._jobs = jobs
        self._recovery = recovery
        self._host_view = host_view
        self._gate = gate
        self._pace = Pace()

    async def serve(self, channel: MessageChannel, peer: Identity, address: str = "") -> None:
        """Serve one channel of a peer at `address` until it ends, and close it."""
        try:
            if peer.role is Role.AGENT:
                await self._serve_agent(channel, peer, address)
            else:
                await self._serve_operator(channel, peer, address)
        except PeerGone:
            pass
        except PeerMisbehaved as exc:
            log_event(_log, logging.WARNING, "peer misbehaved", peer=str(peer), cause=str(exc))
        finally:
            with anyio.CancelScope(shield=True):
                await channel.aclose()

    async def _serve_agent(self, channel: MessageChannel, peer: Identity, address: str) -> None:
        with anyio.move_on_after(limits.HANDSHAKE_TIMEOUT_S) as waiting:
            first = await channel.receive()
        if waiting.cancelled_caught:
            return
        await self._in_pace(peer)
        if not isinstance(first, Attach):
            raise BadMessage(f"an agent attaches to a session, this one sent {type(first).__name__}")
        await self._incoming.serve(channel, first, peer.name, address)

    async def _serve_operator(self, channel: MessageChannel, peer: Identity, address: str) -> None:
        while True:
            with anyio.move_on_after(IDLE_S) as waiting:
                request = await channel.receive()
            if waiting.cancelled_caught:
                return
            await self._in_pace(peer)
            answer: object
            try:
                await self._decide(request, peer, address)
                if isinstance(request, Watch):
                    await self._watch(channel, self._jobs.get(request.job))
                    continue
                answer = await self._answer(request, peer)
            except (MigrationError, TransportError) as exc:
                if isinstance(exc, PeerMisbehaved) and not isinstance(request, Check):
                    raise
                answer = _refusal(exc)
            except Exception as exc:
                # A task's edge: a bug in one request must not end the agent.
                _log.exception("a request failed inside the agent")
                answer = Refused(
                    code="internal-error",
                    text=f"{type(request).__name__} failed inside the agent ({type(exc).__name__}); its log has more",
                )
            await channel.send(answer)

    async def _in_pace(self, peer: Identity) -> None:
        """Hold a peer that asks too often. Within a session an agent is not held: its calls come one by one, the last
        of them in the guest's downtime."""
        if (wait_s := self._pace.wait_s(peer, anyio.current_time())) > 0:
            await anyio.sleep(wait_s)

    async def _decide(self, request: object, peer: Identity, address: str) -> None:
        """Ask the rules before anything is done. What is no request of an operator is refused by `_answer`."""
        match request:
            case GetHost():
                self._gate.pass_or_refuse(peer, address, Action.HOSTS)
            case GetCpus():
                self._gate.pass_or_refuse(peer, address, Action.CPU)
            case ListGuests():
                self._gate.pass_or_refuse(peer, address, Action.GUESTS)
            case ListJobs():
                self._gate.pass_or_refuse(peer, address, Action.JOBS)
            case Check(guest=word, to=to) | Move(guest=word, to=to):
                self._gate.pass_or_refuse(
                    peer,
                    address,
                    Action.MOVE if isinstance(request, Move) else Action.CHECK,
                    what=word,
                    guest=names_among(await self._outgoing.guests(), word),
                    source=self._host_view().name,
                    to=to,
                )
            case Watch() | SetLimits() | Pause() | Resume() | Cancel() | Resolve():
                self._decide_on_job(request, peer, address)

    def _decide_on_job(
        self, request: Watch | SetLimits | Pause | Resume | Cancel | Resolve, peer: Identity, address: str
    ) -> None:
        # A job that is not there is decided about like one of a guest that nobody knows: who may not see a guest
        # does not learn of its jobs.
        guest = UNKNOWN_GUEST
        with contextlib.suppress(UnknownJob):
            view = self._jobs.get(request.job).view()
            guest = GuestNames(name=view.guest_name, guest_id=view.guest_id)
        self._gate.pass_or_refuse(
            peer,
            address,
            _ACTIONS[type(request)],
            what=f"job {request.job[:8]}",
            guest=guest,
            job=request.job,
            only_looks=isinstance(request, Resolve) and not (request.act or request.take),
        )

    async def _answer(
        self, request: object, peer: Identity
    ) -> HostView | CpuView | GuestList | CheckReport | JobStarted | JobList | Done | Resolution:
        match request:
            case GetHost():
                return await self._recovery.with_memory(self._host_view())
            case GetCpus():
                return CpuView(hypervisors=await self._outgoing.cpus())
            case ListGuests():
                guests = await self._outgoing.guests()
                return GuestList(host=self._host_view().name, guests=self._gate.guests_for(peer, guests))
            case Check(guest=guest, to=to, measures=measures):
                return await self._outgoing.check(
                    guest,
                    to,
                    lambda facts: self._gate.permission_to_move(
                        peer,
                        GuestNames(name=facts.name, guest_id=facts.guest_id),
                        what=guest,
                        source=self._host_view().name,
                        to=to,
                    ),
                    measures=measures,
                )
            case Move():
                job = await self._outgoing.start(request)
                return JobStarted(job=job.job_id)
            case ListJobs():
                return JobList(
                    host=self._host_view().name,
                    jobs=self._gate.jobs_for(peer, (job.view() for job in self._jobs)),
                )
            case SetLimits():
                self._controls(request.job).set_limits(
                    downtime_limit_s=request.downtime_limit_s,
                    bandwidth_bytes_per_s=request.bandwidth_bytes_per_s,
                )
                return Done()
            case Pause(job=job_id):
                self._controls(job_id).pause()
                return Done()
            case Resume(job=job_id):
                self._controls(job_id).resume()
                return Done()
            case Cancel(job=job_id):
                self._controls(job_id).cancel()
                return Done()
            case Resolve(job=job_id, act=act, take=take):
                return await self._recovery.resolve(self._jobs.get(job_id), act=act, take=take)
            case _:
                raise BadMessage(f"{type(request).__name__} is no request of an operator")

    async def _watch(self, channel: MessageChannel, job: Job) -> None:
        while True:
            change, view = job.next_change(), job.view()
            await channel.send(view)
            if view.has_ended:
                return
            await change.wait()
            with anyio.move_on_after(WATCH_PAUSE_S):
                await _until_ended(job)

    def _controls(self, job_id: str) -> Controls:
        job = self._jobs.get(job_id)
        if job.has_ended:
            raise TooLate(f"job {job_id[:8]} has ended already (phase {job.phase})")
        if job.controls is None:
            view = job.view()
            raise SetupRefused(f"job {job_id[:8]} is led by {view.source}: ask the agent there")
        return job.controls


async def _until_ended(job: Job) -> None:
    while not job.has_ended:
        await job.next_change().wait()


def _refusal(exc: Exception) -> Refused:
    code = next(code for kind, code in _CODES if isinstance(exc, kind))
    return Refused(code=code, text=str(exc))
