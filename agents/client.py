"""The client of a fleet's agents: what the command line and jobs (a drain, a balancer, a cron task) call.

Law: plans nothing and prints nothing. Runs on asyncio and on trio. Its only tasks ask hosts side by side, and
end before the call returns. Every wait has a deadline. A job lives in its agent: losing this client, or the
connection, ends no move.

A drain of one host, whole:

    import anyio
    from agents.client import Fleet
    from agents.config import load_client_settings
    from migrate.errors import InDoubt, MigrationFailed

    async def drain(host: str, to: str) -> None:
        fleet = Fleet(load_client_settings())
        async with fleet.connect(host) as agent:
            guests = (await agent.guests()).guests
        for guest in guests:
            try:
                report = await fleet.move(guest.guest_id, to)
            except InDoubt:
                raise  # nobody may touch this guest before `vmferry resolve`
            except MigrationFailed as exc:
                print(exc)  # it runs where it was
            else:
                print(guest.name, report.total_s, report.downtime)

    anyio.run(drain, "host-a", "host-b")                  # asyncio
    anyio.run(drain, "host-a", "host-b", backend="trio")  # trio
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass, replace
from typing import Final, Generic, NamedTuple, TypeVar

import anyio

from agents.api import GuestList, HostView, JobList, JobView, Move, PredictionList
from agents.config import ClientSettings
from agents.connection import REQUEST_TIMEOUT_S, WATCH_SILENCE_S, AgentClient
from agents.errors import (
    AgentError,
    Ambiguous,
    HostUnknown,
    MoveInDoubt,
    MoveRolledBack,
    NotFound,
    RequestRefused,
)
from migrate.compression import Compression
from migrate.phases import Phase
from migrate.plan import OnTimeout
from migrate.stats import Report
from transport.credit import Backoff
from transport.errors import LocalMisuse, PeerGone, TransportError

__all__ = [
    "AgentClient",
    "Answers",
    "Connect",
    "Fleet",
    "FoundGuest",
    "FoundJob",
    "report_of",
    "report_or_raise",
    "where_it_runs",
]

T = TypeVar("T")

Connect = Callable[[str], AbstractAsyncContextManager[AgentClient]]

# An agent that is restarted is back within this; one that is not needs a person.
OUTAGE_S: Final = 60.0
# A rollback closes connections and ends a machine, each with a budget of some seconds.
CANCEL_WAIT_S: Final = 30.0
# A person who watches does not notice the first; the second spares a host that is down.
REDIAL_FIRST_S: Final = 0.2
REDIAL_MOST_S: Final = 3.0


class Answers(NamedTuple, Generic[T]):
    """What each host answered, and the reason for each that did not; both by host, in the configuration's order."""

    answers: dict[str, T]
    unreachable: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundGuest:
    """A guest and the host that it is on."""

    host: str
    guest_id: str
    name: str
    is_running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundJob:
    """A job and the agent to ask about it: the source's, where that answers."""

    host: str
    job: str
    view: JobView


class Fleet:
    """All agents of one configuration. Holds no connection between calls; tasks may share it.

    `connect` replaces the dialling, for tests and tunnels. `outage_s` bounds how long a watch dials an agent
    that does not answer, first after `redial_first_s`. `cancel_wait_s` bounds the wait for the rollback when
    `move` is cancelled.
    """

    def __init__(
        self,
        settings: ClientSettings,
        *,
        connect: Connect | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
        outage_s: float = OUTAGE_S,
        cancel_wait_s: float = CANCEL_WAIT_S,
        watch_silence_s: float = WATCH_SILENCE_S,
        redial_first_s: float = REDIAL_FIRST_S,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._timeout_s = timeout_s
        self._outage_s = outage_s
        self._cancel_wait_s = cancel_wait_s
        self._watch_silence_s = watch_silence_s
        self._redial_first_s = redial_first_s

    def connect(self, host: str) -> AbstractAsyncContextManager[AgentClient]:
        """Connect to one agent; see `AgentClient.connect`.

        Raises:
            HostUnknown: the configuration does not name it.
        """
        endpoint = self._settings.hosts.get(host)
        if endpoint is None:
            raise HostUnknown(host, tuple(self._settings.hosts))
        if self._connect is not None:
            return self._connect(host)
        return AgentClient.connect(host, endpoint, self._settings.tls, timeout_s=self._timeout_s)

    async def hosts(self) -> Answers[HostView]:
        """Ask all agents what their hosts are."""
        return await self._ask_all(lambda agent: agent.host())

    async def guests(self) -> Answers[GuestList]:
        """Ask all agents for their guests."""
        return await self._ask_all(lambda agent: agent.guests())

    async def jobs(self) -> Answers[JobList]:
        """Ask all agents for their jobs. A job is known to both its ends."""
        return await self._ask_all(lambda agent: agent.jobs())

    async def predictions(self, guest: str = "") -> Answers[PredictionList]:
        """Ask all agents what they predicted of moves from their hosts, and what became of it."""
        return await self._ask_all(lambda agent: agent.predictions(guest))

    async def find_guest(self, name_or_id: str) -> str:
        """Give the host that a guest is on.

        Raises:
            NotFound, Ambiguous: they list what was found, and who did not answer.
        """
        return (await self.locate_guest(name_or_id)).host

    async def locate_guest(self, name_or_id: str) -> FoundGuest:
        """Find a guest; an identity goes before a name. Raises like `find_guest`."""
        lists, unreachable = await self.guests()
        all_guests = [
            FoundGuest(host=host, guest_id=guest.guest_id, name=guest.name, is_running=guest.is_running)
            for host, answer in lists.items()
            for guest in answer.guests
        ]
        found = [guest for guest in all_guests if guest.guest_id == name_or_id]
        found = found or [guest for guest in all_guests if guest.name == name_or_id]
        if not found:
            raise NotFound("guest", name_or_id, tuple(self._settings.hosts), unreachable)
        if len(found) > 1:
            phrases = tuple(
                f"{guest.guest_id} ({guest.name}, {'running' if guest.is_running else 'paused'}) on {guest.host}"
                for guest in found
            )
            raise Ambiguous("guest", name_or_id, phrases, unreachable)
        return found[0]

    async def find_job(self, job: str) -> FoundJob:
        """Find a job by its id, or by the first letters of it that no other job has.

        Raises:
            NotFound, Ambiguous: they list what was found, and who did not answer.
        """
        lists, unreachable = await self.jobs()
        found: dict[str, FoundJob] = {}
        for host, answer in lists.items():
            for view in answer.jobs:
                # The source has the figures and the levers; the other end is asked only for want of it.
                if view.job.startswith(job) and (view.job not in found or view.is_outgoing):
                    found[view.job] = FoundJob(host=host, job=view.job, view=view)
        if job in found:
            return found[job]
        if not found or not job:
            raise NotFound("job", job, tuple(self._settings.hosts), unreachable)
        if len(found) > 1:
            phrases = tuple(
                f"{one.job} ({one.view.guest_name}, {one.view.source} to {one.view.destination}, {one.view.phase})"
                for one in found.values()
            )
            raise Ambiguous("job", job, phrases, unreachable)
        return next(iter(found.values()))

    async def start(self, host: str, move: Move) -> str:
        """Start a move of a guest that is on `host`; give its job.

        Raises:
            RequestRefused: nothing was started.
            PeerGone: `may_have_reached_peer` tells whether it may have been started.
        """
        async with self.connect(host) as agent:
            try:
                return await agent.move(move)
            except PeerGone as exc:
                if not exc.may_have_reached_peer:
                    raise
                raise PeerGone(f"{exc}; the move may have begun: `vmferry jobs` lists it then") from exc

    async def watch(self, host: str, job: str) -> AsyncGenerator[JobView, None]:
        """Follow a job of `host` to its end, over as many connections as it takes. Use with `contextlib.aclosing`.

        Raises:
            PeerGone: the agent could not be reached for `outage_s`; the job may go on there.
            RequestRefused: the agent does not know the job (any more).
        """
        backoff = Backoff(self._redial_first_s, REDIAL_MOST_S, random.Random())
        well_at_s = anyio.current_time()
        while True:
            was_heard = False
            try:
                async with (
                    self.connect(host) as agent,
                    aclosing(agent.watch(job, silence_s=self._watch_silence_s)) as views,
                ):
                    async for view in views:
                        was_heard = True
                        yield view
                        if view.has_ended:
                            return
            except PeerGone as exc:
                if was_heard:
                    backoff.reset()
                    well_at_s = anyio.current_time()
                left_s = well_at_s + self._outage_s - anyio.current_time()
                if left_s <= 0:
                    raise PeerGone(
                        f"{exc}. The job goes on without us: `vmferry watch {job}` follows it when {host} answers"
                    ) from exc
            await anyio.sleep(min(left_s, backoff.next_s()))

    async def follow(
        self, host: str, job: str, on_progress: Callable[[JobView], None] | None = None
    ) -> JobView:
        """Watch a job to its end; give the last view. `on_progress` hears every view. Raises like `watch`."""
        async with aclosing(self.watch(host, job)) as views:
            async for view in views:
                if on_progress is not None:
                    on_progress(view)
                if view.has_ended:
                    return view
        raise LocalMisuse("a watch ended before its job")

    async def cancel(self, host: str, job: str) -> None:
        """Ask for the end of a job; a watch says when it is rolled back. Refused (`too-late`) near the end."""
        async with self.connect(host) as agent:
            await agent.cancel(job)

    async def move(
        self,
        guest: str,
        to: str,
        *,
        is_offline: bool = False,
        downtime_limit_s: float | None = None,
        bandwidth_bytes_per_s: int | None = None,
        timeout_s: float | None = None,
        on_timeout: OnTimeout | None = None,
        compression: Compression | None = None,
        audit: bool = True,
        on_progress: Callable[[JobView], None] | None = None,
        on_cancelled: Callable[[str], None] | None = None,
    ) -> Report:
        """Move one guest, wherever it is, to host `to`, and follow it to its end.

        None is the source agent's configured default. When the awaiting task is cancelled, the job is
        cancelled too and its end awaited; a sentence that says what runs where goes to `on_cancelled` and into
        the notes of the cancellation's exception.

        Returns:
            the report of a move that is complete; a remark of the source, if any, is in its `error`.

        Raises:
            NotFound, Ambiguous, RequestRefused: nothing was started.
            MoveRolledBack: a MigrationFailed: the guest runs on where it was; with the report.
            MoveInDoubt: an InDoubt: ownership must be asked (`resolve`); with the report.
            PeerGone: the source's agent cannot be reached; the move may go on.
        """
        found = await self.locate_guest(guest)
        order = Move(
            guest=found.guest_id,
            to=to,
            is_offline=is_offline,
            downtime_limit_s=downtime_limit_s,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            timeout_s=timeout_s,
            on_timeout=on_timeout,
            compression=compression,
            audit=audit,
        )
        # Shielded, so that no cancellation leaves a job behind whose name nobody knows; it has a deadline.
        with anyio.CancelScope(shield=True):
            job = await self.start(found.host, order)
        try:
            view = await self.follow(found.host, job, on_progress)
        except anyio.get_cancelled_exc_class() as exc:
            sentence = await self._cancel_and_tell(found.host, job)
            exc.add_note(sentence)
            if on_cancelled is not None:
                on_cancelled(sentence)
            raise
        return report_or_raise(view)

    async def _cancel_and_tell(self, host: str, job: str) -> str:
        sentence = (
            f"nobody knows how job {job} ended: {host} was asked to cancel it; see `vmferry watch {job}`"
        )
        with anyio.move_on_after(self._cancel_wait_s, shield=True):
            try:
                # Too late, or ended already: its end says how.
                with suppress(RequestRefused):
                    await self.cancel(host, job)
                sentence = where_it_runs(await self.follow(host, job))
            except (TransportError, AgentError) as exc:
                sentence = f"{sentence} ({exc})"
        return sentence

    async def _ask_all(self, ask: Callable[[AgentClient], Awaitable[T]]) -> Answers[T]:
        answers: dict[str, T] = {}
        unreachable: dict[str, str] = {}

        async def ask_one(host: str) -> None:
            try:
                async with self.connect(host) as agent:
                    answers[host] = await ask(agent)
            except LocalMisuse:
                raise
            except (TransportError, AgentError) as exc:
                unreachable[host] = str(exc)

        async with anyio.create_task_group() as tasks:
            for host in self._settings.hosts:
                tasks.start_soon(ask_one, host)
        order = list(self._settings.hosts)
        return Answers(
            {host: answers[host] for host in order if host in answers},
            {host: unreachable[host] for host in order if host in unreachable},
        )


def report_or_raise(view: JobView) -> Report:
    """Give the report of a job that is complete.

    Raises:
        MoveRolledBack, MoveInDoubt: it ended otherwise; with the report.
    """
    report = report_of(view)
    if report.phase is Phase.COMPLETE:
        return report
    if report.phase is Phase.ROLLED_BACK:
        raise MoveRolledBack(report)
    raise MoveInDoubt(view.job, report)


def report_of(view: JobView) -> Report:
    """Give the report of a job that has ended, as far as its agent still has it.

    A job that was in doubt and then resolved has its last phase. One whose agent was restarted, or that came
    in here, has lost its figures: what the view does not know is 0 or None.
    """
    runs_on = {Phase.COMPLETE: view.destination, Phase.ROLLED_BACK: view.source}.get(view.phase)
    if view.report is not None:
        if view.report.phase is view.phase:
            return view.report
        return replace(view.report, phase=view.phase, runs_on=runs_on, error=view.because or None)
    return Report(
        phase=view.phase,
        guest_id=view.guest_id,
        guest_name=view.guest_name,
        source=view.source,
        destination=view.destination,
        runs_on=runs_on,
        error=None if view.phase is Phase.COMPLETE else view.because or None,
        total_s=0.0,
        downtime=None,
        rounds=view.rounds,
        counts=view.progress.counts,
        ram_bytes=0,
        wire_bytes=view.progress.wire_bytes,
        resent_bytes=view.progress.resent_bytes,
        link_breaks=view.progress.link_breaks,
        tracking="",
        audit_s=None,
        source_digest=None,
        destination_digest=None,
    )


def where_it_runs(view: JobView) -> str:
    """Say what runs where, as far as this view of a job knows."""
    guest, source, destination = view.guest_name, view.source, view.destination
    match view.phase:
        case Phase.COMPLETE:
            return f"{guest} runs on {destination}"
        case Phase.ROLLED_BACK:
            return f"{guest} runs on {source}, nothing is left on {destination}"
        case Phase.IN_DOUBT | Phase.SWITCHOVER:
            return (
                f"nobody knows yet whether {guest} runs on {destination}; on {source} it stays stopped. "
                f"See `vmferry resolve {view.job}`"
            )
        case Phase.STOP:
            return f"{guest} is stopped on {source}, about to go on"
        case _:
            return f"{guest} runs on {source}"
