"""What a restart finds in the journals, and the way out of doubt for an operator.

Law: a journal says what may have happened, the ownership record what did. A guest is resumed here only when the
record is ours, or when the journal proves that COMMIT cannot have left and the record was never taken.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents.api import HostView, Resolution
from agents.errors import JournalCorrupt
from agents.host.jobs import Job
from agents.host.orders import Order
from agents.host.parts import HostParts
from agents.journal import JournalEntry, JournalFile, list_open, read_journal
from agents.logs import get_logger, log_event
from migrate.controls import Controls
from migrate.doubt import record_that_it_runs, settle
from migrate.errors import GuestUnknown, InDoubt, JournalFailed, MigrationError, SetupRefused, StorageFailed
from migrate.ownership import (
    Ownership,
    RecordInvalid,
    Verdict,
    is_destinations,
    next_generation,
    verdict_for_source,
)
from migrate.phases import TERMINAL, Phase
from migrate.plan import Policy
from migrate.ports import IncomingGuest, RunningGuest

__all__ = ["Recovery"]

_log = get_logger(__name__)

# A restarted agent is there after a second, a storage server that failed over after some.
SETTLE_EVERY_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unfinished:
    """A migration as its journal tells it. `claim` is what this host would record, or may have recorded."""

    path: Path
    migration_id: str
    is_outgoing: bool
    guest_id: str
    guest_name: str
    peer: str
    ownership_dir: str
    claim: Ownership
    may_be_decided: bool
    order: Order | None
    was_given_up: bool
    may_be_given_back: bool

    def again(self) -> Order | None:
        """Give the next attempt; None where nobody asked for one, or it was given up."""
        return None if self.order is None or self.was_given_up else self.order.again(self.migration_id)


class Recovery:
    """Journals of migrations that have no procedure any more."""

    def __init__(
        self,
        host: HostParts,
    ) -> None:
        self._host = host
        self._resolving = anyio.Lock()

    async def with_memory(self, view: HostView) -> HostView:
        """Fill in what only the hypervisors know."""
        facts = [await hypervisor.host_facts() for hypervisor in self._host.hypervisors.values()]
        return replace(
            view,
            free_memory_bytes=min((fact.free_memory_bytes for fact in facts), default=0),
            guests=sum(len(fact.guest_ids) for fact in facts),
        )

    async def take_up(self) -> list[Order]:
        """Look through the journals once, before anything new begins; give the moves that can go on.

        A migration that cannot have been decided is rolled back. One that may have been is a job in doubt, and
        is settled at once if the shared storage answers. A guest that is still here, and that nobody had given up
        moving, is to be moved on.
        """
        go_on: list[Order] = []
        state_dir = self._host.settings.agent.state_dir
        for path in await anyio.to_thread.run_sync(list_open, state_dir):
            try:
                unfinished = self._read(path)
            except JournalCorrupt as exc:
                log_event(_log, logging.ERROR, "journal damaged", cause=str(exc))
                continue
            if unfinished is None:
                # One that cannot be closed, because the disk is full, is looked at again by the next restart.
                try:
                    await self._close(path)
                except JournalFailed as exc:
                    log_event(_log, logging.ERROR, "journal not ended", cause=str(exc))
                continue
            job = self._job(unfinished)
            log_event(
                _log,
                logging.WARNING,
                "unfinished migration found",
                job=job.job_id,
                guest=unfinished.guest_name,
                may_be_decided=unfinished.may_be_decided,
            )
            try:
                await self._settle(job, unfinished)
            except (MigrationError, RecordInvalid) as exc:
                log_event(_log, logging.ERROR, "migration in doubt", job=job.job_id, cause=str(exc))
                continue
            if job.phase is Phase.ROLLED_BACK and (again := unfinished.again()) is not None:
                go_on.append(again)
        return go_on

    async def keep_settling(self) -> None:
        """Ask the record of every job in doubt again and again, until the storage and the other host have answered."""
        while True:
            await anyio.sleep(SETTLE_EVERY_S)
            for job in self._host.jobs.in_doubt():
                try:
                    await self.resolve(job, act=True)
                except (MigrationError, RecordInvalid, JournalFailed, JournalCorrupt) as exc:
                    log_event(_log, logging.DEBUG, "migration still in doubt", job=job.job_id, cause=str(exc))

    async def resolve(self, job: Job, *, act: bool, take: bool = False) -> Resolution:
        """Tell what is known of a job in doubt; with `act`, ask the record and obey it.

        With `take`, take back a guest that the destination has taken and never said to run. If it runs there after
        all, there are two until its agent sees the record.

        Raises:
            SetupRefused: the job is not in doubt, or there is nothing to take back.
            InDoubt: the storage gave no answer that can be relied on.
        """
        async with self._resolving:
            if job.phase is not Phase.IN_DOUBT:
                raise SetupRefused(f"job {job.job_id[:8]} is not in doubt: its phase is {job.phase}")
            unfinished = self._read(
                self._host.settings.agent.state_dir / "journal" / f"{job.migration_id}.log"
            )
            if unfinished is None:
                raise SetupRefused(f"the journal of job {job.job_id[:8]} does not say what it was")
            if take:
                await self._take_back(unfinished)
            if act or take:
                await self._settle(job, unfinished)
            return await self._describe(job, unfinished)

    # ------------------------------------------------------------------ reading

    def _read(self, path: Path) -> _Unfinished | None:
        entries = read_journal(path)
        # The last one: a source that saw a newer record before it asked for the machine says so by another "started".
        begin = next((entry for entry in reversed(entries) if entry.step in ("started", "prepared")), None)
        if begin is None or any(entry.step in ("complete", "rolled-back") for entry in entries):
            return None
        return self._unfinished(path, begin, {entry.step for entry in entries})

    def _unfinished(self, path: Path, begin: JournalEntry, steps: set[str]) -> _Unfinished:
        facts = begin.facts
        is_outgoing = begin.step == "started"
        generation = facts["generation"]
        if not isinstance(generation, int):
            raise JournalCorrupt(path, 0, "the generation is no number")
        return _Unfinished(
            path=path,
            migration_id=path.stem,
            is_outgoing=is_outgoing,
            guest_id=str(facts["guest_id"]),
            guest_name=str(facts["guest_name"]),
            peer=str(facts["destination" if is_outgoing else "source"]),
            ownership_dir=str(facts["ownership_dir"]),
            claim=Ownership(
                guest_id=str(facts["guest_id"]),
                generation=generation + 1,
                owner=self._host.settings.agent.name,
                migration_id=path.stem,
            ),
            may_be_decided=bool(steps & {"commit-may-leave", "may-claim"}),
            order=Order.from_bytes(facts.get("order")),
            was_given_up="rolling-back" in steps,
            may_be_given_back="may-give-back" in steps,
        )

    def _job(self, unfinished: _Unfinished) -> Job:
        here = self._host.settings.agent.name
        job = Job(
            job_id=unfinished.order.job if unfinished.order else unfinished.migration_id,
            guest_id=unfinished.guest_id,
            guest_name=unfinished.guest_name,
            source=here if unfinished.is_outgoing else unfinished.peer,
            destination=unfinished.peer if unfinished.is_outgoing else here,
            is_outgoing=unfinished.is_outgoing,
            metrics=self._host.metrics,
            controls=Controls(Policy()) if unfinished.is_outgoing else None,
        )
        job.migration_id = unfinished.migration_id
        job.phase_changed(Phase.SETUP, Phase.IN_DOUBT, "the agent was restarted in the middle of it")
        job.ended(None, "the agent was restarted in the middle of it")
        self._host.jobs.add(job)
        return job

    # ------------------------------------------------------------------ settling

    async def _settle(self, job: Job, unfinished: _Unfinished) -> None:
        if unfinished.is_outgoing:
            await self._settle_outgoing(job, unfinished)
        else:
            await self._settle_incoming(job, unfinished)

    async def _take_back(self, unfinished: _Unfinished) -> None:
        """Record that the guest is given back, in place of the destination, unless it has said something since."""
        latest = await self._host.storage.latest(unfinished.ownership_dir, unfinished.guest_id)
        verdict = verdict_for_source(latest, unfinished.claim)
        if not unfinished.is_outgoing or verdict is not Verdict.TAKEN:
            raise SetupRefused(
                "only the source takes a guest back, and only one that the destination has taken and not said to run"
            )
        claim = unfinished.claim
        again = next_generation(claim, claim.owner, claim.migration_id)
        await self._host.storage.claim(unfinished.ownership_dir, again)

    async def _settle_outgoing(self, job: Job, unfinished: _Unfinished) -> None:
        """The guest is ours unless the destination has recorded its claim."""
        if unfinished.may_be_decided:
            verdict = await settle(self._host.storage, unfinished.ownership_dir, unfinished.claim)
        else:
            verdict = Verdict.SOURCE
        guest = await self._running(unfinished.guest_id)
        if verdict is Verdict.SOURCE:
            if guest is not None:
                await guest.resume()
                await guest.release()
            job.resolved(Phase.ROLLED_BACK, "the guest belongs to this host and runs here")
        else:
            if guest is not None:
                await guest.pause()
                await guest.destroy()
                await guest.release()
            job.resolved(Phase.COMPLETE, f"the ownership record names {unfinished.peer}")
        await self._close(unfinished.path)

    async def _settle_incoming(self, job: Job, unfinished: _Unfinished) -> None:
        """The guest is ours only if we recorded our claim.

        A claim that was asked for may be recorded late, by a storage that hung. So nothing is ended here before a
        record in the source's name stands in its way.
        """
        latest = await self._host.storage.latest(unfinished.ownership_dir, unfinished.guest_id)
        if latest is None or latest.generation < unfinished.claim.generation - 1:
            # What was there when the move began is gone: another storage is mounted, or none.
            raise InDoubt(
                f"{unfinished.ownership_dir} does not show generation {unfinished.claim.generation - 1} of the "
                f"ownership record of {unfinished.guest_name}, which was there when the move began"
            )
        if unfinished.may_be_decided and latest.generation < unfinished.claim.generation:
            latest = await self._give_to_source(unfinished, unfinished.claim.generation)
        elif unfinished.may_be_given_back and latest == unfinished.claim:
            latest = await self._give_to_source(unfinished, unfinished.claim.generation + 1)
        incoming = await self._left_incoming(unfinished.guest_id)
        if is_destinations(latest, unfinished.claim):
            guest = incoming or await self._running(unfinished.guest_id)
            if guest is None:
                raise InDoubt(
                    f"{unfinished.guest_name} belongs to this host by generation {latest.generation} and is not here: "
                    + (
                        f"it never said that it ran. The stopped copy on {unfinished.peer} may be the last one"
                        if latest == unfinished.claim
                        else "it ran here, and has ended since"
                    )
                )
            await guest.resume()
            await guest.release()
            await record_that_it_runs(self._host.storage, unfinished.ownership_dir, unfinished.claim)
            job.resolved(Phase.COMPLETE, "the ownership record is ours, and the guest runs here")
        else:
            if incoming is not None:
                await incoming.destroy()
                await incoming.release()
            elif latest.owner == unfinished.peer and (taken_back := await self._running(unfinished.guest_id)):
                # Somebody said that this host was off, and took the guest back.
                await taken_back.pause()
                await taken_back.destroy()
                await taken_back.release()
            job.resolved(Phase.ROLLED_BACK, f"generation {latest.generation} belongs to {latest.owner}")
        await self._close(unfinished.path)

    async def _give_to_source(self, unfinished: _Unfinished, generation: int) -> Ownership:
        """Record that the source owns the guest, unless another record stands; give the newest one."""
        wanted = replace(unfinished.claim, generation=generation, owner=unfinished.peer)
        return await self._host.storage.claim(unfinished.ownership_dir, wanted)

    async def _running(self, guest_id: str) -> RunningGuest | None:
        for hypervisor in self._host.hypervisors.values():
            with contextlib.suppress(GuestUnknown):
                return await hypervisor.open_guest(guest_id)
        return None

    async def _left_incoming(self, guest_id: str) -> IncomingGuest | None:
        for hypervisor in self._host.hypervisors.values():
            if (incoming := await hypervisor.find_incoming(guest_id)) is not None:
                return incoming
        return None

    async def _close(self, path: Path) -> None:
        def close() -> None:
            file, _ = JournalFile.reopen(path)
            file.close(ended=True)

        await anyio.to_thread.run_sync(close)

    async def _describe(self, job: Job, unfinished: _Unfinished) -> Resolution:
        here, peer = self._host.settings.agent.name, unfinished.peer
        try:
            latest = await self._host.storage.latest(unfinished.ownership_dir, unfinished.guest_id)
        except (StorageFailed, RecordInvalid) as exc:
            latest, record = None, f"cannot be read: {exc}"
        else:
            record = (
                f"generation {latest.generation} belongs to {latest.owner} (in {unfinished.ownership_dir})"
                if latest
                else f"there is none in {unfinished.ownership_dir}"
            )
        if job.phase in TERMINAL:
            runs_here = (job.phase is Phase.ROLLED_BACK) == unfinished.is_outgoing
            verdict = f"settled: the guest belongs to {here if runs_here else peer}"
            return self._resolution(job, unfinished, record, verdict, here if runs_here else peer)
        claim = unfinished.claim
        if unfinished.is_outgoing:
            verdict = {
                Verdict.SOURCE: f"the guest belongs to {here}: --act lets the stopped copy here run on",
                Verdict.DESTINATION: f"the guest belongs to {peer}: --act ends the stopped copy here",
                Verdict.TAKEN: f"{peer} has taken the guest and has not said that it runs: the stopped copy here may "
                f"be the last one, and stays. It is settled as soon as the agent on {peer} is back. If {peer} is off "
                "for good, --take lets the copy here run on; if it is not, there are two",
                Verdict.UNDECIDED: f"nobody has taken generation {claim.generation} yet: --act takes it for {here}, "
                f"and from then on {peer} can no longer run the guest",
            }[verdict_for_source(latest, claim)]
        elif is_destinations(latest, claim):
            verdict = f"the guest belongs to {here}: --act runs it if it is still here"
        else:
            verdict = f"{here} did not take the guest over: --act ends the empty copy here"
        return self._resolution(job, unfinished, record, verdict, None)

    def _resolution(
        self, job: Job, unfinished: _Unfinished, record: str, verdict: str, runs_on: str | None
    ) -> Resolution:
        return Resolution(
            job=job.job_id,
            guest_name=unfinished.guest_name,
            phase=job.phase,
            record=record,
            verdict=verdict,
            runs_on=runs_on,
            is_resolved=job.phase in TERMINAL,
        )
