"""Rounds of pages from one RAM to another: whole, as deltas, and put off."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.bitmap import DirtyBitmap
from memory.codec import MAX_PAYLOAD_BYTES, BatchEncoder
from memory.digest import RamDigest
from memory.history import PageHistory
from memory.layout import PAGE_BYTES
from memory.runs import Runs, expand, pages_in, whole
from migrate.batching import LARGE_BATCH_PAGES, LOOK_EVERY_S, SMALL_BATCH_PAGES, BatchSize
from migrate.compression import Compression, CompressionChooser, DeltaChooser
from migrate.devicestate import StagedState
from migrate.pagewire import PageConsumer, PageProducer, Pool
from migrate.stats import PageCounts
from tests.memory.strategies import run
from tests.migrate.world import PAGES, ArrayRam

KEY = bytes(range(16))


class Pair:
    """Two RAMs, and what is between them; `compression` is that of whole pages."""

    def __init__(self, *, kept_pages: int = PAGES, compression: Compression = Compression.OFF) -> None:
        self.source, self.destination = ArrayRam(PAGES), ArrayRam(PAGES)
        self.dirty = DirtyBitmap(PAGES)
        self.history = PageHistory(kept_pages * PAGE_BYTES)
        self.digests = RamDigest(PAGES, KEY), RamDigest(PAGES, KEY)
        self._encoders = Pool(lambda: BatchEncoder(self.digests[0], history=self.history))
        self._chooser, self._deltas = CompressionChooser(compression, int), DeltaChooser()
        self.batch_size = BatchSize(int)
        self.consumer = PageConsumer(ram=self.destination, digest=self.digests[1], state=StagedState())

    def write(self, gfns: range | list[int], salt: int, octets: int = 8) -> None:
        rng = np.random.default_rng(salt)
        for gfn in gfns:
            self.source.pages[gfn, :octets] = np.frombuffer(rng.bytes(octets), np.uint8)
            self.dirty.mark(run((gfn, 1)))

    def begin(self) -> PageProducer:
        return PageProducer(
            ram=self.source,
            runs=self.dirty.take_runs(),
            chooser=self._chooser,
            deltas=self._deltas,
            history=self.history,
            encoders=self._encoders,
            batch_size=self.batch_size,
            clock=time.monotonic,
        )

    def take(self, producer: PageProducer, payloads: int = 1 << 30) -> int:
        """Carry so many payloads over; give how many there were."""
        out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
        for taken in range(payloads):
            size = producer(out)
            if size == 0:
                return taken
            self.consumer(out[:size])
        return payloads

    def round(self) -> PageCounts:
        written = self.dirty.runs()
        self.history.keep(written)
        producer = self.begin()
        self.take(producer)
        return producer.counts

    def is_equal(self) -> bool:
        return (
            bool((self.source.pages == self.destination.pages).all())
            and self.digests[0].total() == self.digests[1].total()
        )


def test_what_is_written_again_travels_as_a_delta() -> None:
    pair = Pair()
    pair.write(range(PAGES), 1, PAGE_BYTES)
    assert pair.round().delta_pages == 0
    for salt in range(3):
        pair.write(range(0, PAGES, 2), salt)
        counts = pair.round()
        assert (counts.pages, counts.delta_pages) == (PAGES // 2, PAGES // 2)
        assert counts.delta_bytes < PAGES // 2 * 64
        assert pair.is_equal()


def test_a_delta_that_is_applied_twice_is_seen_by_the_digest() -> None:
    pair = Pair()
    pair.write(range(8), 1, PAGE_BYTES)
    pair.round()
    pair.write(range(8), 2)
    producer, out = pair.begin(), memoryview(bytearray(MAX_PAYLOAD_BYTES))
    size = producer(out)
    for _ in range(2):
        pair.consumer(out[:size])
    assert pair.digests[0].total() != pair.digests[1].total()


@given(
    kept=st.sampled_from([0, 7, 100, PAGES]),
    compression=st.sampled_from(list(Compression)),
    rounds=st.lists(
        st.tuples(
            st.lists(st.integers(0, PAGES - 1), max_size=150),
            st.sampled_from([1, 8, 1000, PAGE_BYTES]),
            st.booleans(),
            st.booleans(),
        ),
        max_size=8,
    ),
)
@settings(deadline=None, max_examples=40)
def test_after_each_round_both_ends_have_the_same_whatever_was_written(
    kept: int, compression: Compression, rounds: list[tuple[list[int], int, bool, bool]]
) -> None:
    pair = Pair(kept_pages=kept, compression=compression)
    pair.write(range(0, PAGES, 3), 5, PAGE_BYTES)
    pair.round()
    for salt, (gfns, octets, zeroes, is_cut) in enumerate(rounds):
        pair.write(gfns, salt, octets)
        if zeroes and gfns:
            pair.source.pages[gfns[0]] = 0
        if is_cut:
            # Some of it arrives; then all of it is to be sent again, and nobody knows what has arrived.
            in_hand = pair.dirty.runs()
            pair.take(pair.begin(), 1)
            pair.dirty.mark(in_hand)
            pair.history.forget(in_hand)
        pair.round()
        assert pair.is_equal()


def test_pages_that_are_put_off_come_last_as_they_are_then_and_once() -> None:
    pair = Pair()
    pair.write(range(PAGES), 1, PAGE_BYTES)
    producer = pair.begin()
    pair.take(producer, 1)
    written = run((0, 4), (300, 4))
    # 0 to 3 have gone already.
    assert producer.put_off(written).tolist() == [[300, 4]]
    assert producer.remaining_pages == PAGES - SMALL_BATCH_PAGES
    pair.take(producer, 3)
    assert not pair.destination.pages[300:304].any()
    pair.write(range(300, 304), 2)
    # Again, and some that have gone meanwhile: they can be put off no more.
    assert producer.put_off(run((200, 2), (302, 1))).tolist() == [[302, 1]]
    pair.take(producer)
    assert producer.counts.pages == PAGES
    assert pair.is_equal()


def test_pages_that_are_put_off_have_a_base_afterwards() -> None:
    pair = Pair()
    pair.write(range(PAGES), 1, PAGE_BYTES)
    producer = pair.begin()
    pair.history.keep(run((500, 10)))
    producer.put_off(run((500, 10)))
    pair.take(producer)
    pair.write(range(500, 510), 2)
    assert pair.round().delta_pages == 10
    assert pair.is_equal()


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_that_take_while_pages_are_put_off_send_each_once(threads: int) -> None:
    for salt in range(10):
        pair = Pair()
        pair.write(range(PAGES), salt, PAGE_BYTES)
        producer = pair.begin()
        takers = [threading.Thread(target=pair.take, args=(producer,), daemon=True) for _ in range(threads)]
        for taker in takers:
            taker.start()
        late: Runs = producer.put_off(whole(PAGES))
        for taker in takers:
            taker.join()
        assert producer.counts.pages == PAGES
        assert len(set(expand(late).tolist())) == pages_in(late)
        assert pair.is_equal()


def test_a_fast_link_takes_twice_as_many_pages_at_once() -> None:
    pair = Pair()
    acked = iter(range(0, 1 << 62, 1 << 40))
    pair.batch_size = BatchSize(lambda: next(acked))
    pair.batch_size.pages(time.monotonic() - LOOK_EVERY_S)
    pair.write(range(PAGES), 1, PAGE_BYTES)
    producer = pair.begin()
    pair.take(producer, 1)
    assert producer.counts.pages == LARGE_BATCH_PAGES
    pair.take(producer)
    assert pair.is_equal()
