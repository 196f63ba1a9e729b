"""The incoming procedure: an empty machine becomes the guest, in the order of the requests that come.

Law: the mirror of `source`. The guest may run here only after this host's own record was created; before that
any failure leaves nothing here, and after it nothing is undone by time or by a lost connection.

Tasks: none of its own. The agent calls `handle` for one request at a time and `abandon` when the source has
been silent for too long or the agent ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import anyio.to_thread

from memory.digest import DIGEST_BYTES, MIN_KEY_BYTES, RamDigest
from memory.errors import RamError
from memory.layout import PAGE_BYTES
from memory.runs import pages_in
from migrate.devicestate import StagedState, StateInvalid
from migrate.doubt import record_that_it_runs
from migrate.errors import (
    GuestRefused,
    JournalFailed,
    MigrationError,
    NotRecorded,
    SetupRefused,
    StorageFailed,
    first_failure,
)
from migrate.facts import GuestFacts
from migrate.messages import (
    MAX_COMPARED_GROUPS,
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
    Inspect,
    Inspected,
    Load,
    Loaded,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Running,
)
from migrate.ownership import Ownership, RecordInvalid, next_generation
from migrate.pagewire import PageConsumer
from migrate.phases import DESTINATION, Event, Phase, advance
from migrate.ports import (
    HostSurvey,
    Hypervisor,
    IncomingGuest,
    Journal,
    Observer,
    PayloadConsumer,
    PayloadReceiver,
    SharedStorage,
)
from migrate.undo import UndoStack
from transport.errors import PeerRefused
from transport.seal import SECRET_BYTES

__all__ = ["DestinationPorts", "IncomingMigration", "inspect"]

OLDEST_PROTOCOL = PROTOCOL  # N talks to N-1; there is no N-1 yet


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationPorts:
    """Everything outside that the procedure needs."""

    host: str
    hypervisor: Hypervisor
    storage: SharedStorage
    host_survey: HostSurvey
    journal: Journal
    observer: Observer
    # (request, consumer) -> the receiving side of the data plane
    open_receiver: Callable[[Prepare, PayloadConsumer], Awaitable[PayloadReceiver]]
    # An earlier migration of the same source, by its identity, if it is known here.
    earlier: Callable[[str], IncomingMigration | None]


def check_protocol(protocol: int) -> None:
    """Refuse a version that this one does not speak."""
    if not OLDEST_PROTOCOL <= protocol <= PROTOCOL:
        raise PeerRefused(
            "version",
            f"this agent speaks migration protocol {OLDEST_PROTOCOL} to {PROTOCOL}, the other asked for {protocol}: "
            "upgrade the older of the two",
        )


async def inspect(
    request: Inspect,
    hypervisor: Hypervisor,
    storage: SharedStorage,
    host_survey: HostSurvey,
    *,
    reserved_bytes: int = 0,
) -> Inspected:
    """Answer the preflight's questions; changes nothing but what the source has planted for it."""
    check_protocol(request.protocol)
    return Inspected(
        host=await hypervisor.host_facts(request.guest),
        survey=await host_survey.survey(request.guest),
        objections=await hypervisor.objections(request.guest),
        readings=await storage.read_probes(request.probes),
        ownership_error=await storage.check_ownership_dir(request.ownership_dir, request.guest),
        reserved_bytes=reserved_bytes,
    )


class IncomingMigration:
    """One migration as the destination sees it."""

    def __init__(self, migration_id: str, ports: DestinationPorts) -> None:
        self.migration_id = migration_id
        self.phase = Phase.SETUP
        self.guest_id = ""
        self.guest_name = ""
        self.source_host = ""
        self._ports = ports
        self._undo = UndoStack()
        self._receiver: PayloadReceiver | None = None
        self._is_armed = False
        self._is_journalled = False
        self._is_handed_over = False
        self._lock = anyio.Lock()

    @property
    def received_bytes(self) -> int:
        """Bytes that came over the data connections."""
        return self._receiver.received_bytes if self._receiver else 0

    async def handle(self, request: object) -> object:
        """Answer one request of the source.

        Raises:
            PeerRefused: the answer is no, with the reason in words; before COMMIT nothing is left here then.
        """
        async with self._lock:
            try:
                return await self._answer(request)
            except PeerRefused as exc:
                # A preparation that is refused gets no second try: it must not hold the guest's place here.
                if isinstance(request, Prepare) and self.phase is Phase.SETUP:
                    await self._abandon(exc.text)
                raise
            except (MigrationError, RamError, RecordInvalid, StateInvalid, OSError, ExceptionGroup) as exc:
                cause = first_failure(exc)
                await self._abandon(str(cause))
                raise PeerRefused("refused", str(cause)) from exc

    async def abandon(self, because: str) -> None:
        """Give up if that is still possible: nothing is left here, and COMMIT will be refused."""
        async with self._lock:
            await self._abandon(because)

    async def _answer(self, request: object) -> object:
        match request:
            case Inspect():
                ports = self._ports
                reserved_bytes = await self.reserved_bytes()
                if not reserved_bytes and (earlier := self._ports.earlier(request.resumes)) is not None:
                    reserved_bytes = await earlier.reserved_bytes()
                return await inspect(
                    request, ports.hypervisor, ports.storage, ports.host_survey, reserved_bytes=reserved_bytes
                )
            case Prepare():
                return await self._prepare(request)
            case Compare():
                return await self._compare(request)
            case Ping():
                return self._pong()
            case Arm():
                return await self._arm()
            case Load():
                return await self._load(request)
            case Commit():
                return await self._commit()
            case Abort():
                await self._abandon(f"the source gave up: {request.reason[:200]}")
                return Aborted()
            case _:
                raise PeerRefused("order", f"{type(request).__name__} is no request to a destination")

    # ------------------------------------------------------------------ the procedure

    async def _prepare(self, request: Prepare) -> Prepared:
        """Make the empty machine and open the way for pages."""
        ports = self._ports
        self._expect(Phase.SETUP, request)
        check_protocol(request.protocol)
        if len(request.secret) != SECRET_BYTES or len(request.digest_key) != MIN_KEY_BYTES:
            raise SetupRefused("the keys have the wrong length")
        self.guest_id, self.guest_name = request.guest.guest_id, request.guest.name
        self.source_host = request.source_host
        if request.source_host == ports.host:
            raise SetupRefused(
                f"both hosts are named {ports.host}: neither could tell its own record from the other's"
            )
        self._guest = request.guest
        self._directory = request.ownership_dir
        await self._check_generation(request)
        # Before there is a machine: a restart must know that one may have been left here.
        self._is_journalled = True
        await ports.journal.append(
            "prepared",
            guest_id=self.guest_id,
            guest_name=self.guest_name,
            source=self.source_host,
            generation=request.generation,
            ownership_dir=request.ownership_dir,
        )
        kept = await self._take_over(request)
        self._incoming = incoming = kept or await ports.hypervisor.prepare_incoming(request.guest)
        self._undo.push("the empty machine", self._end_machine)
        self._digest = RamDigest(incoming.ram.total_pages, request.digest_key)
        if kept is not None:
            await anyio.to_thread.run_sync(lambda: self._digest.scan(kept.ram, kept.ram.populated_runs()))
        self._state = StagedState()
        consumer = PageConsumer(ram=incoming.ram, digest=self._digest, state=self._state)
        self._receiver = await ports.open_receiver(request, consumer)
        self._undo.push("the data connections", self._receiver.aclose)
        because = (
            f"goes on with the machine of {request.resumes}" if kept else "an empty machine waits for pages"
        )
        self._advance(Event.PREPARED, because)
        return Prepared(data_port=self._receiver.data_port, is_resumed=kept is not None)

    async def _take_over(self, request: Prepare) -> IncomingGuest | None:
        """Give the machine of an earlier attempt, with what it has received, if there is one that fits."""
        earlier = self._ports.earlier(request.resumes)
        return await earlier.hand_over(self.migration_id, request.guest) if earlier else None

    async def hand_over(self, to: str, guest: GuestFacts) -> IncomingGuest | None:
        """End this migration for another one of the same source; give its machine if that one can go on with it.

        It can before the device state was loaded. A migration that may have been committed is left alone.
        """
        async with self._lock:
            if self.phase is Phase.PRECOPY and _same_machine(self._guest, guest):
                machine, self._is_handed_over = self._incoming, True
                await self._abandon(f"its source was restarted and goes on in migration {to}")
                return machine
            await self._abandon("its source was restarted and begins again")
            return None

    async def _end_machine(self) -> None:
        if not self._is_handed_over:
            await self._incoming.destroy()

    async def _compare(self, request: Compare) -> Compared:
        """Tell where the source's RAM differs from what is here. Pages that come meanwhile are the source's mistake."""
        self._expect(Phase.PRECOPY, request)
        count, rest = divmod(len(request.digests), DIGEST_BYTES)
        first, digest = request.first_group, self._digest
        if rest or not 0 < count <= MAX_COMPARED_GROUPS or not 0 <= first <= digest.groups - count:
            raise PeerRefused(
                "order", f"{len(request.digests)} bytes from group {first} on cannot be compared"
            )

        def compare() -> Compared:
            ours = digest.group_digests(first, count)
            groups = tuple(
                first + at
                for at in range(count)
                if ours[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES]
                != request.digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES]
            )
            return Compared(groups=groups, hashes=digest.hashes_of_groups(groups))

        return await anyio.to_thread.run_sync(compare)

    async def _check_generation(self, request: Prepare) -> None:
        """The source must own the guest by the record that this end sees."""
        problem = await self._ports.storage.check_ownership_dir(request.ownership_dir, request.guest)
        if problem is not None:
            raise SetupRefused(f"the ownership record cannot be kept in {request.ownership_dir}: {problem}")
        latest = await self._ports.storage.latest(request.ownership_dir, request.guest.guest_id)
        if latest is None or latest.generation != request.generation or latest.owner != request.source_host:
            seen = f"generation {latest.generation} of {latest.owner}" if latest else "no record"
            raise SetupRefused(
                f"{request.source_host} says that it owns the guest by generation {request.generation}, and the "
                f"record seen here says {seen}: the two hosts do not see the same storage"
            )
        self._current = latest

    async def _arm(self) -> Armed:
        """The guest still runs at the source: write now what would cost downtime later.

        From here on a restart must ask ownership: COMMIT may come and be obeyed. Asked again, the guest has left an
        earlier stop, whose device state is void; the source's rounds since then have brought the last of it here.
        """
        self._expect(Phase.PRECOPY, Arm())
        self._state.clear()
        if self._is_armed:
            return Armed()
        await self._ports.journal.append("may-claim")
        self._wanted = wanted = next_generation(self._current, self._ports.host, self.migration_id)
        self._undo.push(
            "the prepared claim", lambda: self._ports.storage.unstage_claim(self._directory, wanted)
        )
        await self._ports.storage.stage_claim(self._directory, wanted)
        self._is_armed = True
        return Armed()

    async def _load(self, request: Load) -> Loaded:
        """All pages are here or on their way: wait for the last of them, prove them, and load the device state."""
        self._expect(Phase.PRECOPY, request)
        if not self._is_armed or self._receiver is None:
            raise PeerRefused("order", "Load came before Arm")
        if not 0 <= request.within_s <= MAX_LOAD_WAIT_S:
            raise PeerRefused("order", f"Load may wait {MAX_LOAD_WAIT_S:g} s, not {request.within_s:g}")
        if not await self._receiver.await_applied(request.records, request.within_s):
            # Not given up: the source has left this stop, and goes on from what is here.
            raise PeerRefused(
                "order", f"what had left before Load did not come within {request.within_s:g} s"
            )
        state = self._state.whole(request.state_bytes)
        started_s = time.perf_counter()
        digest = b""

        async def prove() -> None:
            nonlocal digest
            digest = await anyio.to_thread.run_sync(self._digest.total)
            if digest != request.digest:
                raise GuestRefused("the RAM here is not the RAM of the source: the digests differ")

        async with anyio.create_task_group() as parts:
            # Both at once, since the guest stands still: what is loaded here does not run yet.
            parts.start_soon(prove)
            parts.start_soon(self._incoming.load_device_state, state)
        self._advance(Event.READY, "digests are equal and the device state is loaded")
        return Loaded(digest=digest, load_s=time.perf_counter() - started_s)

    async def _commit(self) -> Running | CommitRefused:
        """Take the guest over, then run it. A cancelled agent finishes this first."""
        if self.phase is Phase.ROLLED_BACK:
            return CommitRefused(reason="this migration was rolled back here before COMMIT came")
        self._expect(Phase.STOP, Commit())
        answer: Running | CommitRefused
        with anyio.CancelScope(shield=True):
            answer = await self._claim_and_run()
        return answer

    async def _claim_and_run(self) -> Running | CommitRefused:
        self._advance(Event.COMMIT, "the source has let the guest go")
        wanted, started_s = self._wanted, time.perf_counter()
        try:
            standing = await self._ports.storage.claim(self._directory, wanted)
        except NotRecorded as exc:
            return await self._give_way(f"the claim is known not to be recorded: {exc}")
        except (StorageFailed, RecordInvalid) as exc:
            await self._doubt(f"nobody knows whether the claim was recorded: {exc}")
            raise PeerRefused("in-doubt", str(exc)) from exc
        if standing != wanted:
            return await self._give_way(f"generation {standing.generation} belongs to {standing.owner}")
        return await self._run(wanted, time.perf_counter() - started_s)

    async def _run(self, owned: Ownership, claim_s: float) -> Running | CommitRefused:
        """Run what this host owns now; if it cannot run at all, give the guest back."""
        started_s = time.perf_counter()
        try:
            await self._incoming.resume()
        except GuestRefused as exc:
            returned = next_generation(owned, self.source_host, self.migration_id)
            try:
                # A restart must not run what may have been given back, even if the record comes late.
                await self._ports.journal.append("may-give-back")
                await self._ports.storage.claim(self._directory, returned)
            except (StorageFailed, RecordInvalid, JournalFailed) as failure:
                await self._doubt(f"the guest did not start and could not be given back: {failure}")
                raise PeerRefused("in-doubt", str(failure)) from failure
            return await self._give_way(f"the guest did not start: {exc}")
        except Exception as exc:
            # The hypervisor gave no clear answer: the guest may run. It is ours, and nobody else may touch it.
            await self._doubt(f"nobody knows whether the guest started: {exc}")
            raise PeerRefused("in-doubt", str(exc)) from exc
        resume_s = time.perf_counter() - started_s
        self._advance(Event.RUNNING, f"generation {owned.generation} is ours")
        return Running(claim_s=claim_s, resume_s=resume_s)

    async def finish(self) -> None:
        """After the answer to COMMIT has left: say on the storage that the guest runs, and let go of everything."""
        if self.phase is not Phase.COMPLETE or self._receiver is None:
            return
        with anyio.CancelScope(shield=True):
            await self._take_hands_off()
            # The session stays for a source that asks again; its buffers and tables go now.
            del self._incoming, self._digest, self._state
            await record_that_it_runs(self._ports.storage, self._directory, self._wanted)
            await self._ports.journal.append("complete")
            await self._ports.storage.tidy(self._directory, self.guest_id)

    async def _doubt(self, because: str) -> None:
        """The machine stays as it is; only the hands are taken off it, for whoever settles this."""
        self._advance(Event.FAULT, because)
        await self._take_hands_off()

    async def _take_hands_off(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            await receiver.aclose()
        await self._incoming.release()
        self._undo.forget()

    async def _give_way(self, because: str) -> CommitRefused:
        self._advance(Event.SOURCE_OWNS, because)
        await self._undo.run()
        await self._end_journal()
        return CommitRefused(reason=because)

    async def _abandon(self, because: str) -> None:
        if (self.phase, Event.FAULT) not in DESTINATION or self.phase is Phase.SWITCHOVER:
            return
        leftovers = await self._undo.run()
        self._advance(Event.FAULT, because + (f"; left behind: {', '.join(leftovers)}" if leftovers else ""))
        with anyio.CancelScope(shield=True):
            await self._end_journal()

    async def _end_journal(self) -> None:
        if not self._is_journalled:
            # Refused before anything was done: an entry would make a journal, which nobody closes, of what never began.
            return
        # Nothing is left here. A journal that cannot say so, because its disk is full, only makes a restart look
        # once more; raising here would hide from the source why it was refused.
        with contextlib.suppress(JournalFailed):
            await self._ports.journal.append("rolled-back")

    # ------------------------------------------------------------------ small answers

    def _pong(self) -> Pong:
        failure = self._receiver.failure if self._receiver else None
        if self.phase is Phase.ROLLED_BACK:
            return Pong(received_bytes=0, failure="the migration was rolled back there")
        if self.phase is Phase.STOP:
            return Pong(received_bytes=0, failure="its machine has the device state of a stop that was left")
        return Pong(received_bytes=self.received_bytes, failure=str(failure) if failure else None)

    async def reserved_bytes(self) -> int:
        """Give how much of the guest's RAM has memory here already: it is free no more, and not needed twice."""
        if self._receiver is None or self.phase is Phase.ROLLED_BACK:
            return 0
        runs = await anyio.to_thread.run_sync(self._incoming.ram.populated_runs)
        return pages_in(runs) * PAGE_BYTES

    def _expect(self, phase: Phase, request: object) -> None:
        if self.phase is not phase:
            raise PeerRefused("order", f"{type(request).__name__} came in phase {self.phase}, not in {phase}")

    def _advance(self, event: Event, because: str) -> None:
        old, self.phase = self.phase, advance(DESTINATION, self.phase, event)
        self._ports.observer.phase_changed(old, self.phase, because)


def _same_machine(one: GuestFacts, other: GuestFacts) -> bool:
    """Whether a machine made for one is the machine that the other needs."""
    return (one.guest_id, one.hypervisor, one.machine, one.blocks, one.spec) == (
        other.guest_id,
        other.hypervisor,
        other.machine,
        other.blocks,
        other.spec,
    )
