"""Runs of pages to payloads and back: the one module that knows both memory and the data plane.

Law: no event loop; both classes are called from several worker threads at once, each thread with buffers of
its own. A page is copied out of the running guest once, and digest, compression and sending all work on that
copy: the guest may write the page meanwhile, and then it is dirty again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from memory.codec import MAX_DATA_BYTES, BatchDecoder, BatchEncoder, BatchStats, DecodedBatch
from memory.cursor import RunCursor
from memory.digest import RamDigest, page_views
from memory.history import PageHistory
from memory.layout import PAGE_BYTES
from memory.runs import Runs, intersect, subtract, union
from migrate.batching import SMALL_BATCH_PAGES, BatchSize
from migrate.compression import CompressionChooser, DeltaChooser
from migrate.devicestate import STATE_MARK, StagedState
from migrate.ports import GuestRam
from migrate.stats import PageCounts

__all__ = ["PageConsumer", "PageProducer", "Pool"]


_T = TypeVar("_T")


class Pool(Generic[_T]):
    """Buffers that worker threads borrow: as many as threads ever worked at once."""

    def __init__(self, make: Callable[[], _T]) -> None:
        self._make = make
        self._idle: queue.SimpleQueue[_T] = queue.SimpleQueue()

    def borrow(self) -> _T:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return self._make()

    def give_back(self, item: _T) -> None:
        self._idle.put(item)


class PageProducer:
    """Gives the payloads of one round. An instance is a `migrate.ports.PayloadProducer`.

    Pages that the guest writes again come last: those that `history` has no room for, those that it will have a base
    of, those that it has.
    """

    def __init__(
        self,
        *,
        ram: GuestRam,
        runs: Runs,
        chooser: CompressionChooser,
        deltas: DeltaChooser,
        history: PageHistory,
        encoders: Pool[BatchEncoder],
        batch_size: BatchSize,
        clock: Callable[[], float],
    ) -> None:
        self._ram = ram
        cold, hot, based = history.split(runs)
        # Both are replaced together, under the lock.
        self._whole = RunCursor(cold), RunCursor(hot)
        self._based = RunCursor(based)
        self._chooser = chooser
        self._deltas = deltas
        self._encoders = encoders
        self._batch_size = batch_size
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = PageCounts()

    @property
    def counts(self) -> PageCounts:
        """Pages given so far."""
        with self._lock:
            return self._counts

    @property
    def remaining_pages(self) -> int:
        """Pages of this round that no worker has taken yet."""
        with self._lock:
            return sum(cursor.remaining_pages for cursor in (*self._whole, self._based))

    @property
    def payloads(self) -> int:
        """How many payloads this round has left, at most."""
        with self._lock:
            return sum(
                -(-cursor.remaining_pages // SMALL_BATCH_PAGES) for cursor in (*self._whole, self._based)
            )

    def put_off(self, written: Runs) -> Runs:
        """Send these pages after all others; give those of them that were not taken yet, and will be as they are then.

        The guest goes on writing them: what is sent late is sent once.
        """
        with self._lock:
            cold, hot = (cursor.take_rest() for cursor in self._whole)
            late = intersect(cold, written)
            self._whole = RunCursor(subtract(cold, late)), RunCursor(union(hot, late))
        return union(late, intersect(hot, written))

    def __call__(self, out: memoryview) -> int:
        """Write the next payload to `out`; 0 when the round has no more pages."""
        encoder = self._encoders.borrow()
        encoder.clear()
        try:
            is_ready = as_delta = False
            while not is_ready:
                runs, is_kept, has_base = self._take()
                if not len(runs):
                    break
                as_delta = has_base and self._deltas.tries()
                is_ready = encoder.load(self._ram, runs, is_kept=is_kept, as_delta=as_delta)
            stats = encoder.write(out, level=self._chooser.level())
        finally:
            self._encoders.give_back(encoder)
        if stats.payload_bytes:
            self._learn(stats)
            if as_delta and is_ready:
                self._deltas.tried(is_worth=stats.delta_pages > 0)
        return stats.payload_bytes

    def _take(self) -> tuple[Runs, bool, bool]:
        """Take the next pages, whether there is room for copies of them, and a base; none when all are taken."""
        with self._lock:
            pages = self._batch_size.pages(self._clock())
            for cursor, is_kept in zip(self._whole, (False, True), strict=True):
                if len(runs := cursor.take(pages)):
                    return runs, is_kept, False
        return self._based.take(pages), True, True

    def _learn(self, stats: BatchStats) -> None:
        counts = PageCounts(
            zero_pages=stats.zero_pages,
            raw_pages=stats.raw_pages,
            zstd_pages=stats.zstd_pages,
            delta_pages=stats.delta_pages,
            raw_bytes=stats.data_payload_bytes if stats.raw_pages else 0,
            zstd_bytes=stats.data_payload_bytes if stats.zstd_pages else 0,
            delta_bytes=stats.data_payload_bytes if stats.delta_pages else 0,
        )
        if stats.delta_pages:
            self._chooser.passed(stats.payload_bytes)
        else:
            page_bytes = (stats.raw_pages + stats.zstd_pages) * PAGE_BYTES
            self._chooser.gave(page_bytes, stats.payload_bytes, self._clock())
        with self._lock:
            self._counts += counts


class PageConsumer:
    """Writes payloads to the RAM of the incoming guest, and keeps its device state: a `migrate.ports.PayloadConsumer`.

    The digest is taken from what is read back from the RAM, not from what was received, so that it also
    proves that the pages were written where they belong.
    """

    def __init__(self, *, ram: GuestRam, digest: RamDigest, state: StagedState) -> None:
        self._ram = ram
        self._digest = digest
        self._state = state
        self._decoders = Pool(lambda: BatchDecoder(ram.total_pages))
        self._readback = Pool(_Readback)

    def __call__(self, payload: memoryview) -> None:
        """Take one payload: a batch of pages, or a part of the device state.

        Raises:
            CodecError: theirs; the payload is not a batch for this guest.
            StateInvalid: theirs; it is no part of a device state.
            OutOfRam: the world's; this host cannot give the memory.
        """
        if len(payload) and payload[0] == STATE_MARK:
            self._state.add(payload)
            return
        decoder = self._decoders.borrow()
        try:
            batch = decoder.decode(payload)
            if len(batch.zero_runs):
                self._ram.scatter_zeros(batch.zero_runs)
                self._digest.update_zeros(batch.zero_runs)
            if len(batch.data_runs):
                self._write(batch)
        finally:
            self._decoders.give_back(decoder)

    def _write(self, batch: DecodedBatch) -> None:
        runs = batch.data_runs
        readback = self._readback.borrow()
        buffer = readback.buffer
        try:
            if batch.is_delta:
                size = self._ram.gather(runs, buffer)
                new = np.frombuffer(buffer[:size], dtype=np.uint64)
                np.bitwise_xor(new, np.frombuffer(batch.pages, dtype=np.uint64), out=new)
                self._ram.scatter(runs, buffer[:size])
            else:
                self._ram.scatter(runs, batch.pages)
            size = self._ram.gather(runs, buffer)
            self._digest.update(runs, readback.views[: size // PAGE_BYTES])
        finally:
            self._readback.give_back(readback)


class _Readback:
    """A buffer for the pages of one batch, and a view of each."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(MAX_DATA_BYTES))
        self.views = page_views(self.buffer)
