"""A short look at a running guest: what it writes in windows that grow, and what a sample of its pages shrinks to.

Law: the guest is left as it was, whatever happens: the dirty log is stopped in any case, also when this is cancelled.
Nothing is written to its RAM, and no hole of it is read: that would make a page. Who calls holds the guest alone; two
dirty logs of one guest are in each other's way.

What it costs the guest: one fault for each page that it writes in each window (1 us, or the emulator's write hook). The
windows are WINDOWS at most, so that no page faults more often than that.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread
import numpy as np
import xxhash

from memory.codec import MAX_PAYLOAD_BYTES, BatchEncoder
from memory.errors import TrackerLost
from memory.history import PageHistory
from memory.layout import PAGE_BYTES
from memory.runs import (
    Gfns,
    Runs,
    clip_pages,
    empty_runs,
    intersect,
    pages_in,
    runs_of_gfns,
    subtract,
    union,
)
from migrate.batching import SMALL_BATCH_PAGES
from migrate.compression import ZSTD_LEVEL
from migrate.errors import MigrationFailed
from migrate.forecast import (
    MAX_PROBE_S,
    MIN_PROBE_S,
    PROBE_S,
    ContentSample,
    GuestLoad,
    WriteWindow,
)
from migrate.ports import DirtyTracker, GuestRam, RunningGuest

__all__ = ["probe", "sample_content", "watch_writes"]

# Each twice as long as the one before: 32 ms to 516 ms of one second.
WINDOWS: Final = 5
# 2 MiB: 5 ms of one core, read in stretches, because zstd sees neighbours together in a move as well.
SAMPLE_BATCHES: Final = 4
STRETCH_PAGES: Final = 16
_SEED: Final = 1


async def probe(
    guest: RunningGuest, probe_s: float = PROBE_S, *, clock: Callable[[], float] | None = None
) -> GuestLoad:
    """Watch a guest for about so long; one that is paused writes nothing and is only sampled.

    Raises:
        TrackerError: its writes cannot be seen; it is as before.
        MigrationFailed: the log was lost meanwhile; the guest is as before.
    """
    clock = clock or anyio.current_time
    probe_s = min(max(probe_s, MIN_PROBE_S), MAX_PROBE_S)
    began_s = clock()
    populated = await anyio.to_thread.run_sync(guest.ram.populated_runs)
    sample = await anyio.to_thread.run_sync(sample_content, guest.ram, populated)
    windows: list[WriteWindow] = []
    rewrites = _Rewrites(guest.ram)
    if guest.facts.is_running:
        windows = await watch_writes(guest.tracker, probe_s, clock, rewrites.see)
    return GuestLoad(
        populated_bytes=pages_in(populated) * PAGE_BYTES,
        windows=tuple(windows),
        sample=sample,
        took_s=clock() - began_s,
        rewritten_pages=rewrites.pages,
        delta_bytes=rewrites.delta_bytes,
    )


async def watch_writes(
    tracker: DirtyTracker,
    probe_s: float,
    clock: Callable[[], float] = anyio.current_time,
    see: Callable[[Runs], None] = lambda written: None,
) -> list[WriteWindow]:
    """Start a dirty log, harvest it in windows that grow, and stop it whatever happens. Raises like `probe`.

    `see` is called after each window, in a thread, with what was written in it.
    """
    unit_s = probe_s / (2**WINDOWS - 1)
    seen: list[WriteWindow] = []
    try:
        await anyio.to_thread.run_sync(tracker.start)
        # The first harvest ends the time in which the log was made.
        await anyio.to_thread.run_sync(tracker.harvest)
        opened_s = clock()
        for number in range(WINDOWS):
            await anyio.sleep(max(opened_s + unit_s * 2**number - clock(), 0.0))
            written = await anyio.to_thread.run_sync(tracker.harvest)
            closed_s = clock()
            seen.append(WriteWindow(window_s=max(closed_s - opened_s, 1e-6), pages=pages_in(written)))
            opened_s = closed_s
            await anyio.to_thread.run_sync(see, written)
    except TrackerLost as exc:
        raise MigrationFailed(f"the dirty log was lost: {exc}") from exc
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(tracker.stop)
    return seen


class _Rewrites:
    """What changes in a page between two writes of it, seen at the first pages that a watched guest writes.

    Each is measured after the first window in which it was written again. Later more of it has changed, if the guest
    writes it all the time: a move sends it again after tens of milliseconds, too.
    """

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._history = PageHistory(SMALL_BATCH_PAGES * PAGE_BYTES)
        self._encoder = BatchEncoder(None, history=self._history)
        self._out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
        self._copied = self._unmeasured = empty_runs()
        self.pages = 0
        self.delta_bytes = 0

    def see(self, written: Runs) -> None:
        """Measure what was written again, and copy pages until a batch of them is there."""
        again = intersect(self._unmeasured, written)
        if len(again):
            self._encoder.load(self._ram, again, as_delta=True)
            self.delta_bytes += self._encoder.write(self._out, level=ZSTD_LEVEL).data_payload_bytes
            self.pages += pages_in(again)
            self._unmeasured = subtract(self._unmeasured, again)
        new = clip_pages(subtract(written, self._copied), SMALL_BATCH_PAGES - pages_in(self._copied))
        if len(new):
            self._history.keep(new)
            self._encoder.load(self._ram, new)
            self._encoder.clear()
            self._copied, self._unmeasured = union(self._copied, new), union(self._unmeasured, new)


def sample_content(ram: GuestRam, populated: Runs, *, seed: int = _SEED) -> ContentSample:
    """Look at some stretches of the pages that may differ from zero, as the codec would send them. Blocks."""
    total = pages_in(populated)
    wanted = min(total, SAMPLE_BATCHES * SMALL_BATCH_PAGES)
    if wanted == 0:
        return ContentSample(pages=0, zero_pages=0, duplicate_pages=0, zstd_bytes=0)
    gfns = _chosen(populated, total, wanted, seed)
    encoder = BatchEncoder(None)
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    page = memoryview(bytearray(SMALL_BATCH_PAGES * PAGE_BYTES))
    zero_pages = data_bytes = duplicates = 0
    known: set[int] = set()
    for first in range(0, len(gfns), SMALL_BATCH_PAGES):
        runs = runs_of_gfns(gfns[first : first + SMALL_BATCH_PAGES])
        encoder.load(ram, runs)
        stats = encoder.write(out, level=ZSTD_LEVEL)
        encoder.clear()
        zero_pages += stats.zero_pages
        data_bytes += stats.data_payload_bytes
        ram.gather(runs, page)
        for at in range(pages_in(runs)):
            octets = page[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
            digest = xxhash.xxh3_64_intdigest(octets)
            duplicates += digest in known
            known.add(digest)
    # All zero pages but the first of them are duplicates that cost nothing anyway.
    duplicates = max(duplicates - max(zero_pages - 1, 0), 0)
    return ContentSample(
        pages=len(gfns), zero_pages=zero_pages, duplicate_pages=duplicates, zstd_bytes=data_bytes
    )


def _chosen(populated: Runs, total: int, wanted: int, seed: int) -> Gfns:
    """Give gfns: stretches of STRETCH_PAGES populated pages, one in each of as many equal parts of them."""
    stretches = max(wanted // STRETCH_PAGES, 1)
    random_ = random.Random(seed)
    ends = np.cumsum(populated[:, 1])
    places: set[int] = set()
    for number in range(stretches):
        low, high = number * total // stretches, (number + 1) * total // stretches
        start = random_.randrange(low, max(high - STRETCH_PAGES, low) + 1)
        places.update(range(start, min(start + STRETCH_PAGES, high)))
    at = np.array(sorted(places), dtype=np.int64)
    rows = np.searchsorted(ends, at, side="right")
    before = ends[rows] - populated[rows, 1]
    gfns: Gfns = populated[rows, 0] + (at - before)
    return gfns
