"""A QEMU guest at the source: its dirty log, its stop, its device state, and its way back.

Law: QEMU's own migration is used for one thing: to stop the guest and to give its device state, with x-ignore-shared,
so that no RAM is in it. Until `save_device_state` has begun QEMU goes on by itself if this agent dies; after it has
ended QEMU stays stopped until told otherwise (`postmigrate`): both are what ownership needs, because COMMIT leaves
only then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import anyio
import anyio.from_thread

from agents.hypervisors.qemu.describe import run_state
from agents.hypervisors.qemu.devicestream import StreamEnd
from agents.hypervisors.qemu.errors import QemuError, QemuGone, QmpFailed
from agents.hypervisors.qemu.guest import Hold, OpenGuest
from agents.hypervisors.qemu.qmp import Json, Qmp, event_time_s, field_of
from agents.hypervisors.qemu.tracking import QemuTracker
from memory.dirty import TrackedArea
from memory.layout import PAGE_BYTES
from memory.runs import Runs, empty_runs, intersect
from migrate.errors import GuestRefused
from migrate.facts import GuestFacts
from migrate.ports import DeviceStateSink

__all__ = ["QemuRunningGuest"]

# QEMU decides by itself when its part is small enough to stop: at once, for all that it has to carry is in memory.
_CAPABILITIES: Final = ("x-ignore-shared", "events", "pause-before-switchover")
_PARAMETERS: Final = {"max-bandwidth": 1 << 40, "downtime-limit": 30_000}
# From the command to the stop; a display of 64 MiB is copied to us meanwhile.
STOP_TIMEOUT_S: Final = 20.0
# A block layer that is slower than this to drain has a storage server that hangs: the move is then rolled back.
DRAIN_TIMEOUT_S: Final = 20.0
_ENDED: Final = frozenset({"completed", "failed", "cancelled", ""})


class QemuRunningGuest(OpenGuest):
    """`migrate.ports.RunningGuest`."""

    def __init__(self, held: Hold, facts: GuestFacts, vcpu_threads: tuple[int, ...]) -> None:
        super().__init__(held)
        self._facts = facts
        areas: list[TrackedArea] = []
        first_gfn = 0
        for place in held.places:
            areas += place.areas(first_gfn)
            first_gfn += place.size_bytes // PAGE_BYTES
        self._tracker = QemuTracker(held.process.pid, vcpu_threads, tuple(areas), self._standing_still)
        self._stream: StreamEnd | None = None
        self._has_begun = False
        self._capabilities: list[Json] | None = None
        self._can_drain = True
        # It stands, and it is to: one is known when QEMU has stopped, the other before it is told to.
        self._is_standing = self._is_to_stand = False

    @property
    def facts(self) -> GuestFacts:
        return self._facts

    @property
    def tracker(self) -> QemuTracker:
        return self._tracker

    @property
    def discards(self) -> bool:
        return self._held.spec.has_balloon

    def discarded_runs(self, among: Runs) -> Runs:
        """Give those pages of `among` that a balloon or free-page reporting has punched out of the RAM."""
        suspects = intersect(among, self._tracker.absent()) if self._tracker.sees_absent else among
        return self.ram.holes_among(suspects) if len(suspects) else empty_runs()

    async def drain(self) -> None:
        """Return when no disk has a request under way that was there before.

        An empty transaction drains the whole block layer while the vCPUs run (0.3 ms; 50 ms on a slow disk). A QEMU
        that does not know that is stopped and goes on at once, which drains as well.
        """
        if not self._held.spec.disks or self._is_standing:
            return  # nothing that writes to RAM; a stop has drained already
        with _as_refusal("drain its disks"):
            if self._can_drain:
                try:
                    await self._qmp.execute("transaction", {"actions": []}, timeout_s=DRAIN_TIMEOUT_S)
                except QmpFailed:
                    self._can_drain = False
                else:
                    return
            if await self._stop_for_a_moment():
                await self._go_on()

    async def pause(self) -> float:
        """Stop all vCPUs, and drain; give the seconds it stands by now. May be called twice."""
        with _as_refusal("stop"):
            # Before anything is asked: who has stopped it for a moment only must not let it go on any more.
            self._is_to_stand = True
            if await run_state(self._qmp) != "running":
                self._is_standing = True
                return 0.0
            self._qmp.forget_events()
            await self._qmp.execute("stop", timeout_s=DRAIN_TIMEOUT_S)
            self._is_standing = True
            return await self._standing_s()

    async def prepare_switchover(self) -> None:
        """Tell QEMU how to migrate, and give it the stream; five questions, 4 ms. May be called twice."""
        with _as_refusal("prepare its switchover"):
            await self._prepare(pauses_first=True)

    async def pause_for_switchover(self, send: DeviceStateSink) -> float:
        """Let QEMU migrate up to the point where it has stopped, and send what it wrote until then."""
        with _as_refusal("stop for its switchover"):
            stream = await self._begin(pauses_first=True)
            async with anyio.create_task_group() as reading:
                reading.start_soon(stream.read_all, send)
                await self._wait_status("pre-switchover")
                standing_s = await self._standing_s()
                self._is_standing = True
                reading.cancel_scope.cancel()
            return standing_s

    async def save_device_state(self, send: DeviceStateSink) -> None:
        """Send everything of the stopped machine that is not shared RAM and was not sent yet."""
        with _as_refusal("give its device state"):
            stream = self._stream if self._has_begun else await self._begin(pauses_first=False)
            if stream is None:
                raise QemuGone("the stream of its device state is closed")
            async with anyio.create_task_group() as tasks:
                # QEMU closes its end when it is done, whichever way.
                tasks.start_soon(stream.read_all, send)
                if self._has_begun:
                    await self._qmp.execute("migrate-continue", {"state": "pre-switchover"})
                await self._wait_status("completed")

    async def resume(self) -> None:
        """Let it run again from where it was stopped, its disks its own again. May be called twice."""
        self._is_standing = self._is_to_stand = False
        with _as_refusal("go on"):
            await self._end_migration()
            self._has_begun = False
            if self._stream is not None:
                # What it holds is of this stop.
                await self._stream.aclose()
                self._stream = None
            if await run_state(self._qmp) != "running":
                await self._qmp.execute("cont", timeout_s=DRAIN_TIMEOUT_S)
            if (state := await run_state(self._qmp)) != "running":
                raise QmpFailed("cont", "nonsense", f"it is {state} afterwards")

    async def release(self) -> None:
        """Let go of it: the log ends, QEMU's settings are as they were. May be called twice."""
        if self._held.is_open:
            await anyio.to_thread.run_sync(self._tracker.stop)
            if self._stream is not None:
                await self._stream.aclose()
                self._stream = None
            if self._capabilities is not None:
                # One that has ended has nothing to restore, and one that is busy keeps what we set: harmless.
                try:
                    await self._qmp.execute("migrate-set-capabilities", {"capabilities": self._capabilities})
                except QemuError:
                    self._capabilities = None
        await super().release()

    @property
    def _qmp(self) -> Qmp:
        return self._held.qmp

    async def _prepare(self, *, pauses_first: bool) -> StreamEnd:
        qmp = self._qmp
        if self._capabilities is None:
            known = await qmp.execute("query-migrate-capabilities")
            self._capabilities = [
                one
                for one in (known if isinstance(known, list) else [])
                if field_of(one, "capability") in _CAPABILITIES
            ]
        wanted = [
            {"capability": name, "state": pauses_first or name != "pause-before-switchover"}
            for name in _CAPABILITIES
        ]
        await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
        await qmp.execute("migrate-set-parameters", _PARAMETERS)
        if self._stream is None:
            self._stream = await StreamEnd.open(qmp)
        return self._stream

    async def _begin(self, *, pauses_first: bool) -> StreamEnd:
        """Start QEMU's migration into a stream of ours."""
        stream = self._stream if pauses_first else None
        if stream is None:
            stream = await self._prepare(pauses_first=pauses_first)
        self._qmp.forget_events()
        await self._qmp.execute("migrate", {"uri": stream.uri})
        self._has_begun = pauses_first
        return stream

    async def _wait_status(self, wanted: str) -> None:
        event = await self._qmp.wait_event(
            "MIGRATION", lambda data: data.get("status") in (wanted, "failed"), timeout_s=STOP_TIMEOUT_S
        )
        if field_of(event, "data", "status") == "failed":
            why = field_of(await self._qmp.execute("query-migrate"), "error-desc")
            raise QmpFailed("migrate", "failed", str(why or "its migration failed, and it does not say why"))

    async def _end_migration(self) -> None:
        """Cancel QEMU's migration if one is under way: it goes on by itself then."""
        status = field_of(await self._qmp.execute("query-migrate"), "status")
        if str(status or "") in _ENDED:
            return
        self._qmp.forget_events()
        await self._qmp.execute("migrate_cancel")
        await self._qmp.wait_event(
            "MIGRATION", lambda data: data.get("status") in _ENDED, timeout_s=STOP_TIMEOUT_S
        )
        # It starts its vCPUs just after it has told the status.
        with anyio.move_on_after(STOP_TIMEOUT_S):
            while await run_state(self._qmp) in ("finish-migrate", "postmigrate"):
                if str(field_of(await self._qmp.execute("query-migrate"), "status")) == "completed":
                    return
                await anyio.sleep(0.001)

    async def _standing_s(self) -> float:
        """Give how long it stands, by QEMU's own stamp of the stop."""
        stopped = await self._qmp.wait_event("STOP", timeout_s=STOP_TIMEOUT_S)
        return max(time.time() - event_time_s(stopped), 0.0)

    def _standing_still(self, harvest: Callable[[], Runs]) -> Runs:
        """Run a harvest while the guest stands; called from a worker thread."""
        was_running = anyio.from_thread.run(self._stop_for_a_moment)
        try:
            return harvest()
        finally:
            if was_running:
                anyio.from_thread.run(self._go_on)

    async def _stop_for_a_moment(self) -> bool:
        """Stop it, if it runs; `_go_on` must follow then."""
        if await run_state(self._qmp) != "running":
            return False
        await self._qmp.execute("stop", timeout_s=DRAIN_TIMEOUT_S)
        return True

    async def _go_on(self) -> None:
        # Commands reach QEMU in the order in which they are given here: a `stop` that is given after this counts.
        if not self._is_to_stand:
            await self._qmp.execute("cont")


class _as_refusal:  # noqa: N801  # used as a statement: with _as_refusal("..."):
    """Give this driver's errors as migrate's, with what was asked of QEMU."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QemuError):
            raise GuestRefused(f"QEMU could not {self._what}: {error}") from error
