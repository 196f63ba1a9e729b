"""The outgoing procedure: one guest from this host to another, from top to bottom.

Law: every step ends in `_advance`, which is the one place where the phase changes. Until SWITCHOVER everything
that was done is on the undo stack; from SWITCHOVER on nothing is undone and ownership decides.

Tasks: the dirty log is started beside the destination's preparations. While pages are copied a watcher of the
destination, one of the deadline and one that reports progress run beside it, in the task group of `_precopy` or
`_suspend`, and end with it.

Longer than other modules: what is undone, and from when on no more, can only be judged of the whole procedure.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import anyio

from memory.digest import MIN_KEY_BYTES
from memory.errors import RamError
from migrate.compression import CompressionChooser
from migrate.controls import Controls
from migrate.copying import Copier
from migrate.dirtylog import DirtyLog
from migrate.doubt import settle
from migrate.errors import (
    InDoubt,
    JournalFailed,
    MigrationCancelled,
    MigrationError,
    MigrationFailed,
    NotConverging,
    PreflightRefused,
    SetupRefused,
    first_failure,
)
from migrate.facts import GuestFacts
from migrate.inspection import Asker, run_preflight
from migrate.messages import (
    MAX_LOAD_WAIT_S,
    PROTOCOL,
    Abort,
    Aborted,
    Arm,
    Armed,
    Commit,
    CommitRefused,
    Compare,
    Compared,
    Load,
    Loaded,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Running,
)
from migrate.ownership import Ownership, RecordInvalid, Verdict, next_generation
from migrate.phases import SOURCE, Event, Phase, advance
from migrate.plan import ASSUMED_FIXED_S, Decision, Next, OnTimeout, decide, has_much_left, is_in_sight
from migrate.ports import RunningGuest
from migrate.readiness import Readiness
from migrate.source_ports import SourcePorts, SourceSettings
from migrate.stats import DowntimeParts, Report
from migrate.tally import Tally
from migrate.undo import UndoStack
from transport.errors import PeerRefused, SessionForgotten, TransportError
from transport.seal import SECRET_BYTES

__all__ = ["OutgoingMigration"]

PROGRESS_EVERY_S: Final = 0.05
PING_EVERY_S: Final = 1.0
# How long a guest may stand still before COMMIT, if nobody asked for that: a second for hosts that are busy, or some
# downtime limits for people who gave a long one. A link that fails just then is not waited for.
STOP_BUDGET_S: Final = 1.0
STOP_BUDGET_LIMITS: Final = 4
# A link that fails at every one of so many stops fails because of them, or is none.
MAX_STOPS: Final = 10


class _EndedWithRemark(Exception):
    """An end was reached, with something to say about it; nothing more is to be rolled back."""


class OutgoingMigration:
    """One run of the procedure. `controls` may be used by others while `run` runs."""

    def __init__(
        self, guest_id: str, ports: SourcePorts, settings: SourceSettings, controls: Controls
    ) -> None:
        # Nothing speaks against the move itself: the destination was restarted, or the link failed at the worst moment.
        self.may_try_again = False
        self._guest_id = guest_id
        self._ports = ports
        self._settings = settings
        self._controls = controls
        self._asker = Asker(ports.caller, settings.call_timeout_s)
        self._undo = UndoStack()
        self._phase = Phase.SETUP
        self._guest: RunningGuest | None = None
        self._copier: Copier | None = None
        self._tally = Tally()
        self._is_resumed = False
        self._is_suspended = False
        self._stands_by_wish = False
        self._stops = 0
        self._may_be_loaded = False
        self._ended_s: float | None = None

    async def run(self) -> Report:
        """Move the guest; always give a report that says how it ended and what runs where.

        Cancelling the task rolls back before COMMIT may have left and is held off afterwards.
        """
        started_s = self._ports.clock()
        error: str | None = None
        try:
            with anyio.CancelScope() as scope:
                self._controls.attach(scope)
                guest, copier = await self._bring_to_switchover()
            if scope.cancelled_caught:
                raise self._controls.failure or MigrationCancelled("cancelled")
        except anyio.get_cancelled_exc_class():
            await self._roll_back(MigrationCancelled("the agent ended the migration"))
            raise
        except (
            MigrationError,
            TransportError,
            RamError,
            RecordInvalid,
            OSError,
            BaseExceptionGroup,
        ) as exc:
            error = await self._roll_back(first_failure(exc))
        else:
            # Outside of the try: nothing that goes wrong from here on may reach the undo stack.
            with anyio.CancelScope(shield=True):
                try:
                    await self._switch_over(guest, copier)
                except (InDoubt, _EndedWithRemark) as exc:
                    error = str(exc)
        self._controls.detach()
        ended_s = self._ended_s or self._ports.clock()
        return self._report(error, ended_s - started_s)

    async def _bring_to_switchover(self) -> tuple[RunningGuest, Copier]:
        """Everything that can be undone."""
        guest = await self._setup()
        copier = await self._preflight(guest)
        if self._controls.policy.is_offline:
            await self._suspend(guest, copier)
        else:
            await self._begin_precopy(guest, copier)
            await self._precopy(guest, copier)
        while not await self._stop(guest, copier):
            if self._may_be_loaded:
                # Its Load has an answer before newer pages are sent, which it would take for those that it waits for.
                await self._ask_how_it_is()
                self._may_be_loaded = False
            await self._precopy(guest, copier)
        return guest, copier

    # ------------------------------------------------------------------ the procedure

    async def _setup(self) -> RunningGuest:
        """Take hold of the guest and of its ownership record."""
        ports = self._ports
        self._guest = guest = await ports.hypervisor.open_guest(self._guest_id)
        self._undo.push("the hold on the guest", guest.release)
        self._directory = await ports.storage.ownership_dir(guest.facts)
        self._current = await self._own_record(guest.facts)
        await self._journal_start(guest.facts)
        self._advance(Event.PREPARED, "the guest and its ownership record are in hand")
        return guest

    async def _own_record(self, facts: GuestFacts) -> Ownership:
        """Give the newest record, which must be this host's; make the first one of a guest that has none."""
        ports, settings = self._ports, self._settings
        latest = await ports.storage.latest(self._directory, facts.guest_id)
        if latest is None:
            first = Ownership(
                guest_id=facts.guest_id,
                generation=1,
                owner=settings.host,
                migration_id=settings.migration_id,
            )
            latest = await ports.storage.claim(self._directory, first)
        if latest.owner != settings.host:
            raise SetupRefused(
                f"{facts.name} belongs to {latest.owner} by generation {latest.generation} of its ownership "
                f"record in {self._directory}, and runs here: end one of the two copies"
            )
        return latest

    async def _journal_start(self, facts: GuestFacts) -> None:
        """What a restart must know. Of several, the last one counts."""
        await self._ports.journal.append(
            "started",
            guest_id=facts.guest_id,
            guest_name=facts.name,
            destination=self._settings.destination,
            generation=self._current.generation,
            ownership_dir=self._directory,
            order=self._settings.order,
        )

    async def _preflight(self, guest: RunningGuest) -> Copier:
        """Prove that the destination can run the guest, then have an empty machine made there."""
        ports, settings = self._ports, self._settings
        await self._examine(guest)
        # A destination that was restarted settles an earlier attempt before it answers, and may have given the guest
        # back by a record that was not there when this attempt began.
        latest = await self._own_record(guest.facts)
        if latest != self._current:
            self._current = latest
            await self._journal_start(guest.facts)
        secret, digest_key = secrets.token_bytes(SECRET_BYTES), secrets.token_bytes(MIN_KEY_BYTES)
        self._undo.push(f"the empty machine on {settings.destination}", self._abort_destination)
        log = self._log = DirtyLog(guest.tracker)
        request = Prepare(
            protocol=PROTOCOL,
            guest=guest.facts,
            source_host=settings.host,
            generation=self._current.generation,
            ownership_dir=self._directory,
            secret=secret,
            digest_key=digest_key,
            connections=settings.connections,
            window_bytes=settings.window_bytes,
            resumes=settings.resumes,
        )
        async with anyio.create_task_group() as beside:
            if not self._controls.policy.is_offline:
                beside.start_soon(self._start_log, guest, log)
            prepared = await self._asker.ask(request, Prepared)
        self._is_resumed = prepared.is_resumed
        sender = await ports.open_sender(prepared, secret)
        self._undo.push("the data connections", sender.aclose)
        self._controls.attach_sender(sender)
        chooser = CompressionChooser(settings.compression, lambda: sender.acked_payload_bytes)
        self._copier = Copier(
            guest,
            log,
            sender,
            chooser,
            digest_key,
            ports.clock,
            delta_cache_bytes=settings.delta_cache_bytes,
        )
        return self._copier

    async def _start_log(self, guest: RunningGuest, log: DirtyLog) -> None:
        self._undo.push("the dirty log", log.stop)
        await log.start()
        self._tally.tracking = guest.tracker.method

    async def _begin_precopy(self, guest: RunningGuest, copier: Copier) -> None:
        """See what there is to be sent."""
        # What it has written while its destination was made ready are the pages that it will write again.
        await copier.harvest()
        await self._mark_first(copier)
        self._began_s = anyio.current_time()
        self._advance(Event.PASSED, f"nothing speaks against it; writes are seen by {self._tally.tracking}")

    async def _precopy(self, guest: RunningGuest, copier: Copier) -> None:
        """Copy RAM in rounds while the guest runs, until the planner says that stopping it is cheap."""
        readiness = Readiness(lambda: self._examine(guest), lambda: self._arm(guest))
        async with anyio.create_task_group() as watchers:
            watchers.start_soon(self._watch_destination)
            watchers.start_soon(self._watch_deadline, guest, copier)
            watchers.start_soon(self._report_progress, copier)
            decision = await self._rounds_until_decided(copier, lambda: readiness.begin(watchers))
            if decision.next is Next.ABORT:
                raise NotConverging(decision.because)
            was_ready = await readiness.reached(watchers)
            if not self._is_suspended and (not was_ready or has_much_left(decision, ASSUMED_FIXED_S)):
                await copier.catch_up()
            watchers.cancel_scope.cancel()
        suspends = decision.next is Next.SUSPEND or self._is_suspended
        self._stands_by_wish = suspends
        last = self._last = copier.last_round()
        await self._pause(guest, lambda: guest.pause_for_switchover(last.add_state))
        self._advance(Event.SUSPENDED if suspends else Event.CONVERGED, decision.because)

    async def _suspend(self, guest: RunningGuest, copier: Copier) -> None:
        """Offline: stop the guest first, then copy all of it."""
        self._tally.tracking = "none: the guest is suspended while it is copied"
        self._stands_by_wish = True
        self._last = copier.last_round()
        await self._pause(guest, guest.pause)
        self._advance(Event.SUSPENDED, "offline migration: the guest is suspended, copied and resumed")
        await self._mark_first(copier)
        async with anyio.create_task_group() as watchers:
            watchers.start_soon(self._watch_destination)
            watchers.start_soon(self._report_progress, copier)
            await copier.send_dirty()
            await self._arm(guest)
            watchers.cancel_scope.cancel()

    async def _mark_first(self, copier: Copier) -> None:
        """Make dirty what the first round sends: everything, or what an earlier attempt has not brought there."""
        if not self._is_resumed:
            await copier.mark_populated()
            return

        async def compare(first_group: int, digests: bytes) -> tuple[Sequence[int], bytes]:
            answer = await self._asker.ask(Compare(first_group=first_group, digests=digests), Compared)
            return answer.groups, answer.hashes

        self._tally.kept_pages = await copier.mark_differing(compare)

    async def _arm(self, guest: RunningGuest) -> None:
        """Have both journals say that COMMIT may leave, and the claim prepared, while that costs no downtime.

        A restart that finds the entry asks ownership, which is right whether COMMIT left or not.
        """
        async with anyio.create_task_group() as both:
            both.start_soon(self._asker.ask, Arm(), Armed)
            both.start_soon(guest.prepare_switchover)
            await self._ports.journal.append("commit-may-leave")

    async def _stop(self, guest: RunningGuest, copier: Copier) -> bool:
        """The guest stands still: send what is left of it, and have it proved and loaded.

        A link that fails just now is not waited for as in the pre-copy. False: the guest runs on here, and its
        pre-copy goes on from what the destination has. Who asked for a suspended guest has asked for the wait.
        """
        policy = self._controls.policy
        budget_s = max(STOP_BUDGET_S, STOP_BUDGET_LIMITS * policy.downtime_limit_s)
        self._stops += 1
        try:
            with anyio.fail_after(None if self._stands_by_wish else budget_s):
                await self._copy_last(guest, copier, budget_s)
            return True
        except TimeoutError as exc:
            words = f"the guest stood still for {budget_s:g} s and the link did not carry its last pages"
            if self._stops >= MAX_STOPS:
                raise MigrationFailed(f"{words}: it runs on here") from exc
            await self._return(guest, copier, words)
            return False

    async def _return(self, guest: RunningGuest, copier: Copier, words: str) -> None:
        """Let the stopped guest run on, and everything of its last round be dirty again."""
        with anyio.CancelScope(shield=True):
            copier.take_back_last()
            await guest.resume()
            self._is_suspended = False
        self._advance(Event.RETURNED, f"{words}: it runs on here and is copied on")

    async def _copy_last(self, guest: RunningGuest, copier: Copier, within_s: float) -> None:
        """Send the last pages and the device state, and have them proved and loaded.

        Load leaves when the last payload has, and its answer comes with the acknowledgements: the guest stands still
        for a round trip less. Who waits for a link however long it is broken (a suspended guest) has them first.
        """
        last, given = self._last, anyio.Event()
        saved_s, records = 0.0, 0

        def on_given(count: int) -> None:
            nonlocal records
            records = count
            if not self._stands_by_wish:
                given.set()

        async def send() -> None:
            nonlocal saved_s
            await copier.send_last(last, on_given)
            saved_s = self._ports.clock()
            given.set()

        async with anyio.create_task_group() as parts:
            parts.start_soon(send)
            async with anyio.create_task_group() as makers:
                makers.start_soon(copier.add_last_pages, last)
                makers.start_soon(guest.save_device_state, last.add_state)
            last.finish()
            await given.wait()
            digest = copier.digest()
            self._may_be_loaded = True
            load = Load(
                digest=digest,
                state_bytes=last.state_bytes,
                records=records,
                within_s=min(within_s, MAX_LOAD_WAIT_S),
            )
            loaded = await self._asker.ask(load, Loaded)
            self._loaded_s = self._ports.clock()
        if loaded.digest != digest:
            raise MigrationFailed("the destination's RAM is not what was sent: the digests differ")
        if self._controls.failure is not None:
            raise self._controls.failure
        self._tally.destination_digest = loaded.digest
        saved_s = min(saved_s, self._loaded_s)
        pages_s = last.pages_ended_s(saved_s)
        self._parts_s = (
            self._stopped_s - self._stands_since_s,
            pages_s - self._stopped_s,
            saved_s - pages_s,
            self._loaded_s - saved_s,
        )
        self._advance(Event.READY, "digests are equal and the device state is loaded")

    async def _switch_over(self, guest: RunningGuest, copier: Copier) -> None:
        """Let the destination run it. From here on a missing answer is a doubt, never a reason to go back."""
        destination = self._settings.destination
        reply: Running | CommitRefused
        try:
            reply = await self._asker.ask(
                Commit(), Running, CommitRefused, timeout_s=self._settings.commit_timeout_s
            )
        except (TransportError, OSError) as exc:
            self._advance(Event.FAULT, f"no certain answer to COMMIT: {exc}")
            await self._resolve_doubt(guest, copier)
            return
        if isinstance(reply, CommitRefused):
            self._advance(Event.PEER_REFUSED, reply.reason)
            await self._keep(f"{destination} could not run the guest: {reply.reason}")
            return
        pause_s, last_pages_s, device_state_s, load_s = self._parts_s
        self._tally.downtime = DowntimeParts(
            pause_s=pause_s,
            last_pages_s=last_pages_s,
            device_state_s=device_state_s,
            load_s=load_s,
            resume_s=self._ports.clock() - self._loaded_s,
        )
        self._advance(Event.PEER_RUNNING, f"{destination} owns the guest and runs it")
        await self._let_go(guest, copier)

    async def _resolve_doubt(self, guest: RunningGuest, copier: Copier) -> None:
        """Ask ownership, by taking the guest for this host unless the destination has it."""
        claim = next_generation(self._current, self._settings.host, self._settings.migration_id)
        try:
            verdict = await settle(self._ports.storage, self._directory, claim)
        except InDoubt:
            # The guest stays as it is, stopped: only the hands are taken off it.
            await copier.sender.aclose()
            await guest.release()
            raise
        destination = self._settings.destination
        if verdict is Verdict.SOURCE:
            self._advance(Event.SOURCE_OWNS, f"generation {claim.generation} was taken for {claim.owner}")
            await self._keep(
                f"{destination} gave no certain answer to COMMIT, and ownership went to the source"
            )
        else:
            self._advance(Event.DESTINATION_OWNS, f"the ownership record names {destination}")
            await self._let_go(guest, copier)

    # ------------------------------------------------------------------ steps

    async def _rounds_until_decided(self, copier: Copier, on_near: Callable[[], None]) -> Decision:
        """Copy until the planner has decided; `on_near` is called after each round from which a stop would do."""
        while True:
            await self._controls.wait_while_paused()
            stats = await copier.round()
            policy = self._controls.policy
            decision = decide([*copier.rounds, stats], policy, ASSUMED_FIXED_S)
            self._ports.observer.round_ended(copier.judged(stats, decision))
            self._show_progress(copier)
            if self._is_suspended:
                because = f"the time limit of {policy.timeout_s:g} s has passed, and the guest was suspended"
                return Decision(
                    next=Next.SUSPEND,
                    because=because,
                    predicted_downtime_s=decision.predicted_downtime_s,
                )
            if self._controls.is_paused:
                continue
            if decision.next is not Next.AGAIN:
                return decision
            if is_in_sight(decision, policy):
                on_near()

    async def _pause(self, guest: RunningGuest, pause: Callable[[], Awaitable[float]]) -> None:
        if self._is_suspended:
            return
        if self._stops == 0:
            self._undo.push("the paused guest", guest.resume)
        stands_s = await pause()
        self._stopped_s = self._ports.clock()
        self._stands_since_s = self._stopped_s - stands_s
        self._is_suspended = True

    async def _examine(self, guest: RunningGuest) -> None:
        settings = self._settings
        report = await run_preflight(
            guest,
            self._asker,
            self._ports.storage,
            self._ports.host_survey,
            source_host=settings.host,
            destination=settings.destination,
            resumes=settings.resumes,
        )
        if not report.is_passed:
            raise PreflightRefused(report.problems)

    async def _watch_destination(self) -> None:
        while True:
            await self._ask_how_it_is()
            await anyio.sleep(PING_EVERY_S)

    async def _ask_how_it_is(self) -> None:
        pong = await self._asker.ask(Ping(), Pong)
        if pong.failure is not None:
            # A machine that has the device state of a stop that was left takes no other: only a new one can.
            self.may_try_again = self._may_be_loaded
            raise MigrationFailed(f"{self._settings.destination} cannot go on: {pong.failure}")

    async def _watch_deadline(self, guest: RunningGuest, copier: Copier) -> None:
        policy = self._controls.policy
        if policy.timeout_s <= 0:
            return
        await anyio.sleep_until(self._began_s + policy.timeout_s)
        if policy.on_timeout is OnTimeout.SUSPEND:
            await self._pause(guest, guest.pause)
        else:
            last = copier.rounds[-1].because if copier.rounds else "the first round is not over"
            raise NotConverging(f"the time limit of {policy.timeout_s:g} s has passed: {last}")

    async def _report_progress(self, copier: Copier) -> None:
        while True:
            await anyio.sleep(PROGRESS_EVERY_S)
            self._show_progress(copier)

    def _show_progress(self, copier: Copier) -> None:
        self._ports.observer.progressed(copier.progress(self._phase, is_paused=self._controls.is_paused))

    # ------------------------------------------------------------------ ends

    async def _let_go(self, guest: RunningGuest, copier: Copier) -> None:
        """The guest runs elsewhere: read this copy once more as proof, then end it."""
        self._ended_s = self._ports.clock()
        self._undo.forget()
        self._show_progress(copier)
        remark = ""
        if self._settings.audit:
            try:
                self._tally.source_digest = await copier.audit()
                self._tally.audit_s = self._ports.clock() - self._ended_s
            except (RamError, OSError) as exc:
                remark = f"its old copy could not be read again: {exc}"
        ends = UndoStack()
        ends.push("the hold on the guest", guest.release)
        ends.push("the stopped copy of the guest", guest.destroy)
        ends.push("the dirty log", self._log.stop)
        ends.push("the data connections", copier.sender.aclose)
        left_behind = await ends.run()
        remark = await self._end_journal("complete") or remark
        if left_behind:
            remark = f"at the source remain: {', '.join(left_behind)}"
        if remark:
            raise _EndedWithRemark(f"the guest runs on {self._settings.destination}, but {remark}")

    async def _keep(self, why: str) -> None:
        """The guest is ours by ownership: let it run on, take everything else back."""
        left_behind = await self._undo.run()
        await self._end_journal("rolled-back")
        raise _EndedWithRemark(_with_leftovers(why, left_behind))

    async def _roll_back(self, cause: BaseException) -> str:
        """Before COMMIT: take everything back, newest first. Gives the sentence for the report."""
        self.may_try_again = self.may_try_again or isinstance(cause, SessionForgotten)
        if self._phase is not Phase.SETUP:
            # A restart must not go on with what was being given up.
            with anyio.CancelScope(shield=True):
                await self._end_journal("rolling-back")
        left_behind = await self._undo.run()
        event = Event.CANCEL if isinstance(cause, MigrationCancelled) else Event.FAULT
        self._advance(event, str(cause))
        with anyio.CancelScope(shield=True):
            await self._end_journal("rolled-back")
        return _with_leftovers(str(cause) or type(cause).__name__, left_behind)

    async def _end_journal(self, step: str) -> str:
        # The guest is where it belongs; a journal that cannot say so only makes a restart ask ownership again.
        try:
            await self._ports.journal.append(step)
        except JournalFailed as exc:
            return f"the journal could not be ended: {exc}"
        return ""

    async def _abort_destination(self) -> None:
        # A refusal means that it does not know the migration (any more): nothing is left there.
        with contextlib.suppress(PeerRefused, SessionForgotten):
            await self._asker.ask(Abort(reason="rolled back"), Aborted)

    def _advance(self, event: Event, because: str) -> None:
        old, self._phase = self._phase, advance(SOURCE, self._phase, event)
        self._controls.phase = self._phase
        self._ports.observer.phase_changed(old, self._phase, because)

    def _report(self, error: str | None, total_s: float) -> Report:
        return self._tally.report(
            phase=self._phase,
            guest_id=self._guest_id,
            facts=self._guest.facts if self._guest else None,
            settings=self._settings,
            copier=self._copier,
            error=error,
            total_s=total_s,
        )


def _with_leftovers(sentence: str, left_behind: tuple[str, ...]) -> str:
    return f"{sentence}; left behind: {', '.join(left_behind)}" if left_behind else sentence
