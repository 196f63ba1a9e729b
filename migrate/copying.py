"""Copying a guest's RAM round after round: what is dirty, what was sent, and what it cost.

Law: no phases and no control messages. The order is fixed here: the log is started before RAM is looked at,
and a round ends with a harvest, so a page that is written at any moment is in this round or in a later one.
What was sent last is the base of a delta only where the round that sent it has ended (`memory.history`).
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

import anyio
import anyio.to_thread

from memory.bitmap import DirtyBitmap
from memory.codec import BatchEncoder
from memory.digest import GROUP_PAGES, RamDigest, total_of
from memory.history import PageHistory
from memory.layout import PAGE_BYTES
from memory.runs import Runs, clip, clip_pages, empty_runs, pages_in, subtract, union
from migrate.batching import SMALL_BATCH_PAGES, BatchSize
from migrate.compression import CompressionChooser, DeltaChooser
from migrate.devicestate import FAST_LINK_BYTES_PER_S
from migrate.dirtylog import DirtyLog
from migrate.errors import MigrationFailed
from migrate.lastround import LastRound
from migrate.messages import MAX_COMPARED_GROUPS
from migrate.pagewire import PageProducer, Pool
from migrate.phases import Phase
from migrate.plan import (
    ASSUMED_GOODPUT_BYTES_PER_S,
    FIRST_LOOK_S,
    LOOKS_GROW,
    TELLING_PAGES,
    Decision,
    catches_up,
)
from migrate.ports import PayloadSender, RunningGuest
from migrate.stats import PageCounts, Progress, RoundStats

__all__ = ["Copier"]

RATE_SMOOTHING: Final = 0.3
# Runs that are not worked on in the event loop's thread: so many take some 10 ms.
MANY_ROWS: Final = 1 << 16

# (first group, digests of groups from there on) -> the groups that differ at the destination, and their pages' hashes
Compare = Callable[[int, bytes], Awaitable[tuple[Sequence[int], bytes]]]


class Copier:
    """Copies one guest's RAM over one data plane."""

    def __init__(
        self,
        guest: RunningGuest,
        log: DirtyLog,
        sender: PayloadSender,
        chooser: CompressionChooser,
        digest_key: bytes,
        clock: Callable[[], float],
        *,
        delta_cache_bytes: int = 0,
    ) -> None:
        self.sender: Final = sender
        self._guest = guest
        self._log = log
        self._chooser = chooser
        self._digest_key = digest_key
        self._clock = clock
        self._digest = digest = RamDigest(guest.ram.total_pages, digest_key)
        # Not `self`: a cycle would keep the buffers of an ended migration until a full collection.
        self._history = history = PageHistory(min(delta_cache_bytes, guest.ram.total_pages * PAGE_BYTES))
        self._deltas = DeltaChooser()
        self._encoders = Pool(lambda: BatchEncoder(digest, history=history))
        self._batch_size = BatchSize(lambda: sender.acked_payload_bytes)
        self._dirty = DirtyBitmap(guest.ram.total_pages)
        self._counts = PageCounts()
        self._producer: PageProducer | None = None
        self._in_hand: Runs = empty_runs()
        # What the log has shown since this round began, and pages of it that may still be given room for a copy.
        self._written = DirtyBitmap(guest.ram.total_pages)
        self._hot: Runs = empty_runs()
        self._rounds: list[RoundStats] = []
        self._wire_rate_bytes_per_s = 0.0
        self._seen = (0, self._clock())

    @property
    def rounds(self) -> Sequence[RoundStats]:
        """The rounds that were judged, oldest first."""
        return self._rounds

    @property
    def counts(self) -> PageCounts:
        """Everything sent so far, the round that is under way included."""
        return self._counts + self._producer.counts if self._producer else self._counts

    def digest(self) -> bytes:
        """Give the digest of all RAM as it was sent."""
        return self._digest.total()

    async def audit(self) -> bytes:
        """Give the digest of all RAM as it is now, read page by page. The guest must not run."""
        return await anyio.to_thread.run_sync(lambda: total_of(self._guest.ram, self._digest_key))

    async def mark_differing(self, compare: Compare) -> int:
        """Make everything dirty that a destination which has part of the RAM lacks.

        Gives the number of pages, holes aside, that it has. Reads all of the guest's RAM, at 8 GB/s, so that what is
        equal there need not be sent at the link's rate.
        """
        ram, digest = self._guest.ram, self._digest
        await self._guest.drain()
        runs = await anyio.to_thread.run_sync(ram.populated_runs)
        kept = 0
        for first in range(0, digest.groups, MAX_COMPARED_GROUPS):
            count = min(MAX_COMPARED_GROUPS, digest.groups - first)
            part = clip(runs, first * GROUP_PAGES, (first + count) * GROUP_PAGES)
            await anyio.to_thread.run_sync(digest.scan, ram, part)
            groups, hashes = await compare(first, digest.group_digests(first, count))
            try:
                differing = digest.differing_in_groups(groups, hashes)
            except ValueError as exc:
                raise MigrationFailed(f"the destination compared something else: {exc}") from exc
            kept += pages_in(subtract(part, differing))
            self._dirty.mark(differing)
        return kept

    async def mark_populated(self) -> None:
        """Make everything dirty that may differ from zero. Holes are zero at both ends and never sent."""
        self._dirty.mark(await anyio.to_thread.run_sync(self._guest.ram.populated_runs))

    async def round(self) -> RoundStats:
        """Send what is dirty, then see what the guest wrote meanwhile."""
        started_s, wire_bytes = self._clock(), self.sender.wire_bytes
        if self._rounds:
            counts = await self.send_dirty()
        else:
            async with anyio.create_task_group() as beside:
                beside.start_soon(self._look_now_and_then)
                counts = await self.send_dirty()
                beside.cancel_scope.cancel()
        sent_s = self._clock() - started_s
        await self.harvest()
        duration_s = max(self._clock() - started_s, 1e-6)
        return RoundStats(
            number=len(self._rounds),
            duration_s=duration_s,
            sent_pages=counts.pages,
            wire_bytes=self.sender.wire_bytes - wire_bytes,
            dirty_pages=self._dirty.count,
            dirty_rate_pages_per_s=self._written.count / duration_s,
            goodput_bytes_per_s=self._goodput(counts, sent_s),
        )

    def judged(self, stats: RoundStats, decision: Decision) -> RoundStats:
        """Keep a round together with what was decided after it."""
        stats = replace(stats, predicted_downtime_s=decision.predicted_downtime_s, because=decision.because)
        self._rounds.append(stats)
        return stats

    async def catch_up(self) -> None:
        """Send what the guest wrote since the decision to stop it, until what is left is hardly worth a round.

        Harvested first: what came meanwhile would otherwise be sent when the guest stands still.
        """
        await self.harvest()
        for rounds in itertools.count(1):
            sent_pages = self._dirty.count
            await self.send_dirty()
            await self.harvest()
            if not catches_up(rounds, sent_pages, self._dirty.count):
                return

    async def _look_now_and_then(self) -> None:
        """While the first round is sent, put off what the guest writes: most of it are pages that it keeps writing.

        What the log gave is dirty until the devices' writes have come in: only then may a page be copied that is not
        sent again. A page that a worker has taken by then stays dirty.
        """
        wait_s = FIRST_LOOK_S
        while True:
            await anyio.sleep(wait_s)
            wait_s *= LOOKS_GROW
            with anyio.CancelScope(shield=True):
                written = await self.harvest()
                await self._guest.drain()
                if self._producer is not None:
                    self._dirty.unmark(await anyio.to_thread.run_sync(self._put_off, self._producer, written))

    def _put_off(self, producer: PageProducer, written: Runs) -> Runs:
        late = producer.put_off(written)
        self._keep_copies()
        return late

    async def send_dirty(self) -> PageCounts:
        """Send everything that is dirty now and wait until the destination has it."""
        await self._guest.drain()
        self._producer = producer = await self._page_producer()
        self._chooser.began(self._clock())
        await self.sender.send_all(producer, payloads=producer.payloads)
        self._chooser.ended(self._clock())
        self._producer = None
        self._in_hand = empty_runs()
        self._counts += producer.counts
        return producer.counts

    def last_round(self) -> LastRound:
        """Begin the round of a guest that is about to stop; `send_last` sends what is added to it."""
        slow = not self._rounds or self._rounds[-1].goodput_bytes_per_s < FAST_LINK_BYTES_PER_S
        return LastRound(self._clock, self.sender.more_to_send, is_link_slow=slow)

    async def send_last(self, last: LastRound, on_given: Callable[[int], None]) -> None:
        """Send the last round until it is finished, and wait until the destination has it all.

        `on_given` as in `PayloadSender.send_all`: nothing changes the digest any more then.
        """
        self._chooser.began(self._clock())
        # As much as is dirty already and as much again, and the state beside it: for a handful of pages one connection
        # is woken, whose thread does it all sooner than two that are in each other's way.
        payloads = 1 + 2 * self._dirty.count // SMALL_BATCH_PAGES
        await self.sender.send_all(last, payloads=payloads, on_given=on_given)
        self._chooser.ended(self._clock())
        if self._producer is not None:
            self._counts += self._producer.counts
            self._producer = None
        self._in_hand = empty_runs()

    def take_back_last(self) -> None:
        """The last round was cut off and the guest runs on: whatever was in it is dirty again.

        Some of it has arrived, and nobody knows what.
        """
        self._dirty.mark(self._in_hand)
        self._history.forget(self._in_hand)
        if self._producer is not None:
            self._counts += self._producer.counts
            self._producer = None
        self._in_hand = empty_runs()

    async def add_last_pages(self, last: LastRound) -> None:
        """Add what the stopped guest wrote and gave back since the last harvest."""
        await self.harvest()
        await self.mark_discarded()
        # Room for copies is for rounds to come.
        self._producer = await self._page_producer(keeps_copies=False)
        last.add_pages(self._producer)

    async def harvest(self) -> Runs:
        """Add what the guest wrote since the last harvest, and give it; nothing where no log runs.

        Raises:
            MigrationFailed: the log has a gap.
        """
        # What was taken from the log is nowhere else: a cancellation must not lose it.
        with anyio.CancelScope(shield=True):
            written = await self._log.harvest()
            self._dirty.mark(written)
            self._written.mark(written)
            # No more of them than there may be copies: a large guest writes millions of pages in a round.
            room = self._history.capacity
            self._hot = clip_pages(union(self._hot, clip_pages(written, room)), room)
        return written

    async def mark_discarded(self) -> None:
        """Make the pages dirty that the stopped guest gave back to the host: they are zero, and in no log.

        A balloon or free-page reporting punches them out of the RAM. Only pages that were sent with content count.
        """
        if not self._guest.discards:
            return
        sent = self._digest.data_runs()
        self._dirty.mark(await anyio.to_thread.run_sync(self._guest.discarded_runs, sent))

    def progress(self, phase: Phase, *, is_paused: bool) -> Progress:
        """Tell how far it is; the wire rate is over the time since the last call."""
        sender, now_s = self.sender, self._clock()
        wire_bytes, at_s = self._seen
        self._seen = (sender.wire_bytes, now_s)
        rate = (sender.wire_bytes - wire_bytes) / max(now_s - at_s, 1e-6)
        self._wire_rate_bytes_per_s += RATE_SMOOTHING * (rate - self._wire_rate_bytes_per_s)
        last = self._rounds[-1] if self._rounds else None
        return Progress(
            phase=phase,
            round_number=len(self._rounds),
            dirty_pages=last.dirty_pages if last else 0,
            remaining_pages=self._producer.remaining_pages if self._producer else 0,
            counts=self.counts,
            wire_bytes=sender.wire_bytes,
            resent_bytes=sender.resent_bytes,
            link_breaks=sender.link_breaks,
            wire_rate_bytes_per_s=self._wire_rate_bytes_per_s,
            dirty_rate_pages_per_s=last.dirty_rate_pages_per_s if last else 0.0,
            predicted_downtime_s=last.predicted_downtime_s if last else 0.0,
            is_paused=is_paused,
            because=last.because if last else "",
        )

    def _keep_copies(self) -> None:
        """Have room for copies of what the guest writes, if deltas pay here."""
        if self._chooser.deltas_pay:
            self._history.keep(self._hot)
        else:
            self._history.clear()
        self._hot = empty_runs()

    async def _page_producer(self, *, keeps_copies: bool = True) -> PageProducer:
        self._in_hand = self._dirty.take_runs()
        self._written.clear()

        def make() -> PageProducer:
            if self._rounds and keeps_copies:
                self._keep_copies()
            producer = PageProducer(
                ram=self._guest.ram,
                runs=self._in_hand,
                chooser=self._chooser,
                deltas=self._deltas,
                history=self._history,
                encoders=self._encoders,
                batch_size=self._batch_size,
                clock=self._clock,
            )
            if not self._rounds:
                # Whether copies pay is known later; what is sent late may have one.
                producer.put_off(self._hot)
            return producer

        # A thread's wake-up would cost a stopped guest more than few rows do.
        return make() if len(self._in_hand) < MANY_ROWS else await anyio.to_thread.run_sync(make)

    def _goodput(self, counts: PageCounts, sent_s: float) -> float:
        """Guest RAM moved per second; a round too small to tell inherits the last one's."""
        if counts.pages >= TELLING_PAGES and sent_s > 0:
            return counts.pages * PAGE_BYTES / sent_s
        return self._rounds[-1].goodput_bytes_per_s if self._rounds else ASSUMED_GOODPUT_BYTES_PER_S
