from __future__ import annotations

import threading
import time

import numpy as np

from memory.codec import MAX_PAYLOAD_BYTES, BatchDecoder, BatchEncoder
from memory.runs import whole
from migrate.compression import Compression, CompressionChooser
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


def pages_of(ram: ArrayRam) -> PageProducer:
    return PageProducer(
        ram=ram,
        runs=whole(PAGES),
        chooser=CompressionChooser(Compression.OFF, int),
        encoders=Pool(lambda: BatchEncoder(None)),
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


def test_pages_go_before_the_state_and_their_end_is_noted() -> None:
    last = new()
    last.add_state(b"early")
    last.add_pages(pages_of(full_ram()))
    assert last.pages_given_s is None
    assert kinds(last) == "ppppps-"
    assert last.pages_given_s == 7.0


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

    takers = [threading.Thread(target=take) for _ in range(3)]
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
