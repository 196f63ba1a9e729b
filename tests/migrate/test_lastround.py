from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from memory.codec import MAX_PAYLOAD_BYTES, BatchDecoder, BatchEncoder
from memory.history import PageHistory
from memory.layout import PAGE_BYTES
from memory.runs import Runs, empty_runs, whole
from migrate.batching import BatchSize
from migrate.compression import Compression, CompressionChooser, DeltaChooser
from migrate.devicestate import STATE_MARK, StagedState
from migrate.lastround import LastRound
from migrate.pagewire import PageProducer, Pool
from tests.migrate.world import PAGES, ArrayRam
from transport.producer import NOT_YET

OUT = memoryview(bytearray(MAX_PAYLOAD_BYTES))


def full_ram() -> ArrayRam:
    ram = ArrayRam(PAGES)
    ram.pages[:] = np.arange(PAGES, dtype=np.uint64).astype(np.uint8)[:, None] | 1
    return ram


def pages_of(ram: ArrayRam, *, runs: Runs | None = None) -> PageProducer:
    return PageProducer(
        ram=ram,
        runs=whole(PAGES) if runs is None else runs,
        chooser=CompressionChooser(Compression.OFF, int),
        deltas=DeltaChooser(),
        history=PageHistory(0),
        encoders=Pool(lambda: BatchEncoder(None)),
        batch_size=BatchSize(int),
        clock=time.monotonic,
    )


def new(told: list[int] | None = None) -> LastRound:
    return LastRound(lambda: 7.0, lambda: (told if told is not None else []).append(1), is_link_slow=False)


def kinds(last: LastRound) -> str:
    """Take what is there: `p` for pages, `s` for state, then `-` for nothing now or `.` for the end."""
    taken = ""
    while (size := last(OUT)) > 0:
        taken += "s" if OUT[0] == STATE_MARK else "p"
    return taken + ("-" if size == NOT_YET else ".")


def test_it_has_nothing_yet_until_it_is_finished() -> None:
    last = new()
    assert kinds(last) == "-"
    last.add_state(b"early")
    assert kinds(last) == "s-"
    last.finish()
    assert kinds(last) == "."


def test_pages_go_before_the_state() -> None:
    last = new()
    last.add_state(b"early")
    last.add_pages(pages_of(full_ram()))
    assert kinds(last) == "ppppps-"


def test_the_wait_at_the_end_is_the_pages_or_the_states_as_they_were_many() -> None:
    # The clock stands at 7 s when the last page is given; all of it is acknowledged at 9 s.
    pages, state, both, nothing = new(), new(), new(), new()
    for last in (pages, both):
        last.add_pages(pages_of(full_ram()))
    for last in (state, nothing):
        last.add_pages(pages_of(ArrayRam(PAGES), runs=empty_runs()))
    both.add_state(random.Random(1).randbytes(PAGES * PAGE_BYTES))
    state.add_state(b"x")
    for last in (pages, state, both, nothing):
        last.finish()
        kinds(last)
    assert pages.pages_ended_s(9.0) == 9.0
    assert state.pages_ended_s(9.0) == 7.0
    assert both.pages_ended_s(9.0) == pytest.approx(8.0, abs=0.05)
    assert nothing.pages_ended_s(9.0) == 7.0
    assert new().pages_ended_s(9.0) == 9.0


def test_everything_that_is_added_is_told() -> None:
    told: list[int] = []
    last = new(told)
    last.add_state(b"x")
    last.add_pages(pages_of(full_ram()))
    last.finish()
    assert len(told) == 3


def test_a_large_state_goes_in_parts() -> None:
    last = new()
    last.add_state(bytes(5 << 19))
    last.finish()
    assert kinds(last) == "sss."
    assert last.state_bytes == 5 << 19


def test_threads_that_take_at_once_take_everything_once() -> None:
    last, payloads = new(), []
    lock = threading.Lock()

    def take() -> None:
        out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
        while size := last(out):
            if size > 0:
                with lock:
                    payloads.append(bytes(out[:size]))

    takers = [threading.Thread(target=take, daemon=True) for _ in range(3)]
    for taker in takers:
        taker.start()
    last.add_state(b"early")
    last.add_pages(pages_of(full_ram()))
    last.add_state(b"late")
    last.finish()
    for taker in takers:
        taker.join()
    staged, decoder, gfns = StagedState(), BatchDecoder(PAGES), 0
    for payload in payloads:
        if payload[0] == STATE_MARK:
            staged.add(memoryview(payload))
        else:
            gfns += int(decoder.decode(memoryview(payload)).data_runs[:, 1].sum())
    assert staged.whole(last.state_bytes) == b"earlylate"
    assert gfns == PAGES
