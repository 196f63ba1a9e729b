"""One connection of an operator or a job to one agent: a typed method for each request.

Law: plans nothing, prints nothing, starts no task, dials once. Runs on asyncio and on trio. Every wait has a
deadline. A job lives in its agent: losing the connection ends no move.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Final, Self, TypeVar

import anyio
from anyio import to_thread

from agents.api import (
    CONTROL_SCHEMA,
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
    JobView,
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
from agents.config import Endpoint, TlsSettings
from agents.errors import RequestRefused
from transport.dial import connect
from transport.errors import LocalMisuse, PeerGone, PeerMisbehaved, UntrustedPeer
from transport.tls import Identity, Role, client_context
from transport.wire import MessageChannel

__all__ = ["REQUEST_TIMEOUT_S", "WATCH_SILENCE_S", "AgentClient"]

T = TypeVar("T")

# An agent answers these from memory, or from its hypervisors in a second.
REQUEST_TIMEOUT_S: Final = 10.0
# These ask another agent or the shared storage, which has its own deadlines of some 10 s.
FAR_REQUEST_TIMEOUT_S: Final = 60.0
# A paused job says nothing for hours; a dead link neither. After so long it is asked again, which costs nothing.
WATCH_SILENCE_S: Final = 30.0


class AgentClient:
    """One connection to one agent: one request at a time.

    Make it with `connect`, or from a channel of `api.CONTROL_SCHEMA`, which it owns from then on. A request that
    is cancelled or times out leaves the connection out of step: make a new one.

    Every request raises:
        RequestRefused: the agent's own words; nothing changed.
        PeerGone: no answer in time, or a broken link. `may_have_reached_peer` tells whether it may have obeyed.
        PeerMisbehaved: theirs: an answer that no correct agent gives.
        LocalMisuse: ours: another request, or a watch, is under way.
    """

    def __init__(
        self,
        name: str,
        channel: MessageChannel,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        far_timeout_s: float = FAR_REQUEST_TIMEOUT_S,
    ) -> None:
        self.name: Final = name
        self._channel = channel
        self._timeout_s = timeout_s
        self._far_timeout_s = far_timeout_s
        self._is_asking = False
        self._is_out_of_step = False

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, name: str, endpoint: Endpoint, tls: TlsSettings, *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> AsyncIterator[Self]:
        """Connect to the agent of host `name`, and prove to each other who is who.

        `timeout_s` bounds the connecting, and each request later on.

        Raises:
            PeerGone: the world's: nobody answers there.
            UntrustedPeer: one side does not trust the other's certificate, or it is another host's.
        """
        # The files are read for each connection, so that a long-running job takes a renewed certificate.
        channel = await _dial(name, endpoint, tls, timeout_s)
        async with cls(name, channel, timeout_s=timeout_s) as agent:
            yield agent

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; jobs go on. May be called twice."""
        await self._channel.aclose()

    async def host(self) -> HostView:
        """Ask what this host is and has."""
        return await self._ask(GetHost(), HostView, self._timeout_s)

    async def cpus(self) -> CpuView:
        """Ask which CPU models its hypervisors can give. The first time it asks each of them."""
        return await self._ask(GetCpus(), CpuView, self._far_timeout_s)

    async def guests(self) -> GuestList:
        """Ask for the guests on this host."""
        return await self._ask(ListGuests(), GuestList, self._timeout_s)

    async def check(self, guest: str, to: str, *, measures: bool = True) -> CheckReport:
        """Run the preflight of a move that is not made. `guest` is an identity or a name.

        With `measures` the path between the hosts is measured, which takes a second more.
        """
        return await self._ask(Check(guest=guest, to=to, measures=measures), CheckReport, self._far_timeout_s)

    async def move(self, move: Move) -> str:
        """Start a move; give its job. It goes on in the agent."""
        return (await self._ask(move, JobStarted, self._far_timeout_s)).job

    async def jobs(self) -> JobList:
        """Ask for the jobs that run and those that ended lately."""
        return await self._ask(ListJobs(), JobList, self._timeout_s)

    async def watch(self, job: str, *, silence_s: float = WATCH_SILENCE_S) -> AsyncGenerator[JobView, None]:
        """Follow a job: at once as it is, then at each change; ends after the view that `has_ended`.

        The connection is the watch's until it ends; one that is left early leaves the connection out of step.
        Use with `contextlib.aclosing`.

        Raises:
            PeerGone: also when nothing came for `silence_s`: of a quiet job or a dead link, who knows.
        """
        with self._asking():
            await self._send(Watch(job=job), self._timeout_s)
            wait_s = self._timeout_s
            while True:
                view = await self._answer(JobView, wait_s)
                if view.has_ended:
                    self._is_out_of_step = False
                    yield view
                    return
                yield view
                wait_s = silence_s

    async def set_limits(
        self, job: str, *, downtime_limit_s: float | None = None, bandwidth_bytes_per_s: int | None = None
    ) -> None:
        """Change limits of a running job; None leaves one as it is, a bandwidth of 0 lifts the cap."""
        request = SetLimits(
            job=job, downtime_limit_s=downtime_limit_s, bandwidth_bytes_per_s=bandwidth_bytes_per_s
        )
        await self._ask(request, Done, self._timeout_s)

    async def pause(self, job: str) -> None:
        """Hold a job's pre-copy; the guest runs on."""
        await self._ask(Pause(job=job), Done, self._timeout_s)

    async def resume(self, job: str) -> None:
        """Let a paused pre-copy go on."""
        await self._ask(Resume(job=job), Done, self._timeout_s)

    async def cancel(self, job: str) -> None:
        """Ask for the end of a job; it is rolled back when a watch says so. Refused (`too-late`) near the end."""
        await self._ask(Cancel(job=job), Done, self._timeout_s)

    async def resolve(self, job: str, act: bool = False, take: bool = False) -> Resolution:
        """Tell what is known of a job in doubt; with `act` the ownership record is asked and obeyed.

        `take` lets the stopped copy at the source run on although the destination has taken the guest: only for a
        destination that is certainly off, and has not said that the guest runs there.
        """
        return await self._ask(Resolve(job=job, act=act, take=take), Resolution, self._far_timeout_s)

    async def _ask(self, request: object, answer_type: type[T], timeout_s: float) -> T:
        with self._asking():
            deadline_s = anyio.current_time() + timeout_s
            await self._send(request, timeout_s)
            answer = await self._answer(answer_type, deadline_s - anyio.current_time())
            self._is_out_of_step = False
            return answer

    @contextmanager
    def _asking(self) -> Iterator[None]:
        if self._is_asking:
            raise LocalMisuse(f"another request to {self.name} is under way on this connection")
        if self._is_out_of_step:
            raise PeerGone(
                f"the connection to {self.name} was given up in the middle of a request",
                may_have_reached_peer=False,
            )
        self._is_asking = True
        try:
            yield
        finally:
            self._is_asking = False

    async def _send(self, request: object, timeout_s: float) -> None:
        # Stands until the last answer is in: whatever comes after an error may belong to this request.
        self._is_out_of_step = True
        try:
            with anyio.fail_after(timeout_s):
                await self._channel.send(request)
        except LocalMisuse:
            self._is_out_of_step = False
            raise
        except TimeoutError as exc:
            raise PeerGone(f"{self.name} takes nothing for {timeout_s:g} s") from exc
        except PeerGone as exc:
            raise PeerGone(f"{self.name}: {exc}", may_have_reached_peer=exc.may_have_reached_peer) from exc

    async def _answer(self, answer_type: type[T], timeout_s: float) -> T:
        try:
            with anyio.fail_after(timeout_s):
                answer = await self._channel.receive()
        except TimeoutError as exc:
            raise PeerGone(f"{self.name} did not answer within {max(timeout_s, 0):.3g} s") from exc
        except PeerGone as exc:
            raise PeerGone(f"{self.name}: {exc}") from exc
        except PeerMisbehaved as exc:
            exc.add_note(f"the peer is the agent of {self.name}")
            raise
        if isinstance(answer, Refused):
            self._is_out_of_step = False
            raise RequestRefused(self.name, answer.code, answer.text)
        if not isinstance(answer, answer_type):
            raise PeerMisbehaved(
                f"{self.name} answered with {type(answer).__name__} where {answer_type.__name__} was due"
            )
        return answer


async def _dial(name: str, endpoint: Endpoint, tls: TlsSettings, timeout_s: float) -> MessageChannel:
    try:
        context = await to_thread.run_sync(client_context, tls.certificate, tls.key, tls.ca, tls.crl)
        stream = await connect(
            endpoint.host, endpoint.port, context, Identity(role=Role.AGENT, name=name), timeout_s
        )
    except UntrustedPeer as exc:
        raise UntrustedPeer(f"{name} ({endpoint}): {exc}") from exc
    except PeerGone as exc:
        raise PeerGone(f"the agent of {name}: {exc}", may_have_reached_peer=False) from exc
    return MessageChannel(stream, CONTROL_SCHEMA)
