from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memory.codec import (
    MAX_BATCH_PAGES,
    MAX_DATA_BYTES,
    MAX_KEPT_ZERO_PAGES,
    MAX_PAYLOAD_BYTES,
    MAX_RUNS,
    BatchDecoder,
    BatchEncoder,
    BatchStats,
    DecodedBatch,
    PageKind,
)
from memory.digest import RamDigest, page_views
from memory.errors import CodecError
from memory.history import PageHistory
from memory.layout import PAGE_BYTES
from memory.runs import Runs, check_runs, expand, pages_in
from tests.fakes.ram import BytesRam
from tests.memory.strategies import page, run

VECTORS = Path(__file__).parent.parent / "vectors"
KEY = bytes(range(16))
TOTAL = 1024
HEADER = struct.Struct("<BBHHHI")

fills = st.lists(st.sampled_from([0, 0, 1, 7, 128, 129]), min_size=1, max_size=40)
levels = st.sampled_from([None, 1, -3])


def ram_of(fills: list[int], total_pages: int = TOTAL) -> BytesRam:
    ram = BytesRam(total_pages)
    for gfn, fill in enumerate(fills):
        ram.write(gfn, page(fill))
    return ram


def encode(ram: BytesRam, runs: Runs, level: int | None) -> tuple[memoryview, BatchStats]:
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    stats = BatchEncoder(None).encode_into(ram, runs, out, level=level)
    return out[: stats.payload_bytes], stats


def decode(payload: bytes | bytearray | memoryview, total_pages: int = TOTAL) -> DecodedBatch:
    return BatchDecoder(total_pages).decode(memoryview(payload))


def payload_of(
    *,
    version: int = 1,
    kind: int = PageKind.RAW,
    zero: tuple[tuple[int, int], ...] = (),
    data: tuple[tuple[int, int], ...] = (),
    reserved: int = 0,
    body: bytes = b"",
    body_bytes: int | None = None,
) -> bytes:
    size = len(body) if body_bytes is None else body_bytes
    rows = b"".join(struct.pack("<QI", *row) for row in (*zero, *data))
    return HEADER.pack(version, kind, len(zero), len(data), reserved, size) + rows + body


@given(fills, st.integers(0, 20), levels)
@settings(deadline=None, max_examples=20)
def test_a_batch_is_at_the_destination_what_it_was_at_the_source(
    fills: list[int], first: int, level: int | None
) -> None:
    ram = ram_of([0] * first + fills)
    runs = run((first, len(fills)), (500, 2))
    payload, stats = encode(ram, runs, level)
    batch = decode(payload)
    twin = BytesRam(TOTAL)
    twin.scatter_zeros(batch.zero_runs)
    twin.scatter(batch.data_runs, batch.pages)
    assert twin.contents == ram.contents
    assert stats.zero_pages == pages_in(batch.zero_runs) == fills.count(0) + 2
    assert stats.raw_pages + stats.zstd_pages == pages_in(batch.data_runs)
    assert stats.data_payload_bytes <= pages_in(batch.data_runs) * PAGE_BYTES


@given(fills, levels)
@settings(deadline=None, max_examples=20)
def test_the_digest_is_of_what_was_sent(fills: list[int], level: int | None) -> None:
    ram = ram_of(fills)
    sent, received = RamDigest(TOTAL, KEY), RamDigest(TOTAL, KEY)
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    stats = BatchEncoder(sent).encode_into(ram, run((0, len(fills))), out, level=level)
    batch = decode(out[: stats.payload_bytes])
    received.update_zeros(batch.zero_runs)
    received.update(batch.data_runs, page_views(batch.pages))
    assert sent.total() == received.total()


def sent_before(ram: BytesRam, pages: int) -> tuple[BatchEncoder, PageHistory]:
    """Give an encoder that has sent pages 0 to `pages` of `ram`, and keeps them."""
    history = PageHistory(TOTAL * PAGE_BYTES)
    history.keep(run((0, pages)))
    encoder = BatchEncoder(None, history=history)
    encoder.encode_into(ram, run((0, pages)), memoryview(bytearray(MAX_PAYLOAD_BYTES)), level=None)
    return encoder, history


def send_delta(encoder: BatchEncoder, ram: BytesRam, pages: int) -> tuple[DecodedBatch, BatchStats]:
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    encoder.clear()
    encoder.load(ram, run((0, pages)), as_delta=True)
    stats = encoder.write(out, level=None)
    return decode(bytes(out[: stats.payload_bytes])), stats


def xored(old: bytes, batch: DecodedBatch) -> bytes:
    return bytes(np.frombuffer(old, np.uint8) ^ np.frombuffer(batch.pages, np.uint8))


def test_a_few_words_of_noise_that_were_written_travel_as_a_delta() -> None:
    ram = ram_of([129] * 64)
    encoder, _ = sent_before(ram, 64)
    for version in range(3):
        old = ram.contents[: 64 * PAGE_BYTES]
        for gfn in range(64):
            ram.write(gfn, page(129)[:100] + bytes([version] * 8) + page(129)[108:])
        batch, stats = send_delta(encoder, ram, 64)
        assert batch.is_delta
        assert (stats.delta_pages, stats.raw_pages, stats.zstd_pages) == (64, 0, 0)
        assert stats.payload_bytes < 64 * PAGE_BYTES // 100
        assert xored(bytes(old), batch) == bytes(ram.contents[: 64 * PAGE_BYTES])


def test_pages_that_were_written_anew_travel_whole_and_are_the_next_base() -> None:
    ram = ram_of([128] * 8)
    encoder, history = sent_before(ram, 8)
    for gfn in range(8):
        ram.write(gfn, page(200 + gfn))
    batch, stats = send_delta(encoder, ram, 8)
    assert not batch.is_delta
    assert (stats.delta_pages, stats.raw_pages) == (0, 8)
    assert bytes(batch.pages) == bytes(ram.contents[: 8 * PAGE_BYTES])
    bases = np.empty((8, PAGE_BYTES // 8), np.uint64)
    history.exchange(run((0, 8)), np.zeros_like(bases), bases)
    assert bases.tobytes() == bytes(batch.pages)


def test_a_page_that_became_zero_is_zero_and_so_is_its_base() -> None:
    ram = ram_of([128, 129, 128])
    encoder, _ = sent_before(ram, 3)
    ram.write(1, page(0))
    batch, stats = send_delta(encoder, ram, 3)
    assert (batch.is_delta, batch.zero_runs.tolist(), stats.delta_pages) == (True, [[1, 1]], 2)
    assert not any(batch.pages)
    ram.write(1, bytes(4000) + b"x" * 96)
    batch, _ = send_delta(encoder, ram, 3)
    assert bytes(batch.pages) == bytes(PAGE_BYTES) + bytes(4000) + b"x" * 96 + bytes(PAGE_BYTES)


def test_a_delta_without_a_base_is_our_mistake() -> None:
    ram = ram_of([128, 129])
    with pytest.raises(ValueError, match="no base"):
        BatchEncoder(None).load(ram, run((0, 2)), as_delta=True)
    encoder, _ = sent_before(ram, 1)
    with pytest.raises(ValueError, match="no base"):
        encoder.load(ram, run((0, 2)), as_delta=True)


def test_one_encoder_serves_batches_of_any_kind_one_after_another() -> None:
    encoder, decoder = BatchEncoder(None), BatchDecoder(TOTAL)
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    for fills, level in (([1, 0, 128], 1), ([128] * 3, 1), ([0, 0, 0], 3), ([7], None), ([7], 3)):
        ram = ram_of(fills)
        stats = encoder.encode_into(ram, run((0, len(fills))), out, level=level)
        batch = decoder.decode(out[: stats.payload_bytes])
        expected = b"".join(page(fill) for fill in fills if fill)
        assert bytes(batch.pages) == expected


def test_pages_are_copied_from_a_running_guest_once() -> None:
    class Running(BytesRam):
        gathers = 0

        def gather(self, runs: Runs, out: memoryview) -> int:
            got = super().gather(runs, out)
            self.gathers += 1
            self.write(0, page(9))  # the guest writes as soon as the copy is made
            return got

    ram = Running(TOTAL)
    ram.write(0, page(1))
    digest = RamDigest(TOTAL, KEY)
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    stats = BatchEncoder(digest).encode_into(ram, run((0, 2)), out, level=1)
    batch = decode(out[: stats.payload_bytes])
    assert ram.gathers == 1
    assert bytes(batch.pages) == page(1)
    check = RamDigest(TOTAL, KEY)
    check.update(run((0, 1)), page_views(memoryview(page(1))))
    assert digest.total() == check.total()


def test_data_that_hardly_shrinks_goes_as_it_is() -> None:
    _, stats = encode(ram_of([128, 129]), run((0, 2)), 1)
    assert (stats.raw_pages, stats.zstd_pages) == (2, 0)
    assert stats.data_payload_bytes == 2 * PAGE_BYTES
    _, stats = encode(ram_of([1, 129]), run((0, 2)), 1)
    assert (stats.raw_pages, stats.zstd_pages) == (0, 2)


def test_time_in_zstd_is_counted_by_the_given_clock_only() -> None:
    ticks = iter([1.0, 3.5])
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    encoder = BatchEncoder(None, clock=lambda: next(ticks))
    ram = ram_of([128])
    assert encoder.encode_into(ram, run((0, 1)), out, level=None).compress_s == 0
    assert encoder.encode_into(ram, run((0, 1)), out, level=1).compress_s == 2.5
    assert encode(ram, run((0, 1)), 1)[1].compress_s == 0


def test_a_full_batch_of_scattered_noise_fits_and_one_page_more_is_refused() -> None:
    ram = BytesRam(2 * TOTAL)
    gfns = np.arange(0, 2 * MAX_BATCH_PAGES + 2, 2)
    noise = page(200)
    for gfn in gfns.tolist():
        ram.write(gfn, noise[gfn % 64 :] + noise[: gfn % 64])
    rows = np.column_stack((gfns, np.ones_like(gfns)))
    payload, stats = encode(ram, rows[:-1], None)
    assert stats.raw_pages == MAX_BATCH_PAGES
    assert decode(payload, 2 * TOTAL).pages.nbytes == MAX_DATA_BYTES
    with pytest.raises(ValueError, match="257"):
        encode(ram, rows, None)
    with pytest.raises(ValueError, match="not 0"):
        encode(ram, rows[:0], None)


def test_a_buffer_one_byte_too_small_is_our_mistake() -> None:
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES - 1))
    with pytest.raises(ValueError, match="needs room"):
        BatchEncoder(None).encode_into(ram_of([1]), run((0, 1)), out, level=None)


def test_pages_of_zeros_wait_for_the_next_payload_and_touching_rows_are_one() -> None:
    ram = BytesRam(3 * MAX_BATCH_PAGES)
    ram.write(3 * MAX_BATCH_PAGES - 1, page(1))
    encoder = BatchEncoder(None)
    for batch in range(2):
        assert not encoder.load(ram, run((batch * MAX_BATCH_PAGES, MAX_BATCH_PAGES)))
    assert encoder.load(ram, run((2 * MAX_BATCH_PAGES, MAX_BATCH_PAGES)))
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    stats = encoder.write(out, level=None)
    batch_back = decode(out[: stats.payload_bytes], 3 * MAX_BATCH_PAGES)
    assert batch_back.zero_runs.tolist() == [[0, 3 * MAX_BATCH_PAGES - 1]]
    assert batch_back.data_runs.tolist() == [[3 * MAX_BATCH_PAGES - 1, 1]]
    assert (stats.zero_pages, stats.raw_pages) == (3 * MAX_BATCH_PAGES - 1, 1)


def test_nothing_loaded_is_a_payload_of_nothing() -> None:
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    assert BatchEncoder(None).write(out, level=1).payload_bytes == 0


def test_scattered_zeros_are_written_before_they_outgrow_a_payload() -> None:
    total = 4 * MAX_RUNS
    ram, encoder, out = BytesRam(total), BatchEncoder(None), memoryview(bytearray(MAX_PAYLOAD_BYTES))
    seen: list[int] = []
    for first in range(0, total, 2 * MAX_BATCH_PAGES):
        gfns = np.arange(first, first + 2 * MAX_BATCH_PAGES, 2)
        if encoder.load(ram, np.column_stack((gfns, np.ones_like(gfns)))):
            stats = encoder.write(out, level=None)
            seen += decode(out[: stats.payload_bytes], total).zero_runs[:, 0].tolist()
    stats = encoder.write(out, level=None)
    if stats.payload_bytes:
        seen += decode(out[: stats.payload_bytes], total).zero_runs[:, 0].tolist()
    assert seen == list(range(0, total, 2))


def test_a_guest_of_zeros_alone_is_written_now_and_then() -> None:
    ram, encoder, loads = BytesRam(MAX_KEPT_ZERO_PAGES), BatchEncoder(None), 1
    while not encoder.load(ram, run(((loads - 1) * MAX_BATCH_PAGES, MAX_BATCH_PAGES))):
        loads += 1
    assert loads * MAX_BATCH_PAGES == MAX_KEPT_ZERO_PAGES


def test_a_batch_that_was_not_written_is_not_loaded_over() -> None:
    encoder = BatchEncoder(None)
    encoder.load(ram_of([1]), run((0, 1)))
    with pytest.raises(ValueError, match="write it first"):
        encoder.load(ram_of([1]), run((0, 1)))


ONE = page(1)
FRAME = zstandard.ZstdCompressor().compress(ONE)
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(ONE)
BOMB = zstandard.ZstdCompressor().compress(bytes(64 << 20))

HOSTILE = {
    "nothing": b"",
    "half a header": bytes(11),
    "too long": bytes(MAX_PAYLOAD_BYTES + 1),
    "version 0": payload_of(version=0, zero=((0, 1),)),
    "version 2": payload_of(version=2, zero=((0, 1),)),
    "kind zero": payload_of(kind=PageKind.ZERO, zero=((0, 1),)),
    "kind unknown": payload_of(kind=4, zero=((0, 1),)),
    "reserved bits": payload_of(reserved=1, zero=((0, 1),)),
    "no runs": payload_of(),
    "one run too many": payload_of(zero=tuple((2 * n, 1) for n in range(MAX_RUNS + 1))),
    "cut table": payload_of(zero=((0, 1), (2, 1)))[:-1],
    "body shorter than said": payload_of(data=((0, 1),), body=ONE, body_bytes=PAGE_BYTES + 1),
    "body longer than said": payload_of(data=((0, 1),), body=ONE, body_bytes=PAGE_BYTES - 1),
    "raw page too few": payload_of(data=((0, 2),), body=ONE),
    "raw page too many": payload_of(data=((0, 1),), body=ONE * 2),
    "data without runs": payload_of(zero=((0, 1),), body=ONE),
    "zstd without runs": payload_of(kind=PageKind.ZSTD, zero=((0, 1),), body=FRAME),
    "zstd without a body": payload_of(kind=PageKind.ZSTD, data=((0, 1),)),
    "empty run": payload_of(zero=((0, 0),)),
    "past the end": payload_of(zero=((TOTAL, 1),)),
    "over the end": payload_of(zero=((TOTAL - 1, 2),)),
    "gfn that wraps": payload_of(zero=((2**64 - 1, 1),)),
    "gfn at the sign": payload_of(zero=((2**63, 1),)),
    "unsorted": payload_of(zero=((5, 1), (1, 1))),
    "overlap in a table": payload_of(zero=((0, 3), (2, 1))),
    "overlap of the tables": payload_of(zero=((0, 3),), data=((2, 1),), body=ONE),
    "257 data pages": payload_of(data=((0, 257),), body=bytes(MAX_DATA_BYTES)),
    "257 zstd pages": payload_of(
        kind=PageKind.ZSTD, data=((0, 257),), body=zstandard.compress(bytes(257 * PAGE_BYTES))
    ),
    "delta without runs": payload_of(kind=PageKind.DELTA, zero=((0, 1),), body=FRAME),
    "delta without a body": payload_of(kind=PageKind.DELTA, data=((0, 1),)),
    "delta that is no frame": payload_of(kind=PageKind.DELTA, data=((0, 1),), body=ONE),
    "delta of a page too many": payload_of(kind=PageKind.DELTA, data=((0, 2),), body=FRAME),
    "no frame": payload_of(kind=PageKind.ZSTD, data=((0, 1),), body=b"no frame"),
    "frame too long": payload_of(kind=PageKind.ZSTD, data=((0, 1),), body=zstandard.compress(ONE + b"x")),
    "frame too short": payload_of(kind=PageKind.ZSTD, data=((0, 1),), body=zstandard.compress(ONE[1:])),
    "frame of unknown size": payload_of(kind=PageKind.ZSTD, data=((0, 1),), body=UNSIZED),
    "bomb": payload_of(kind=PageKind.ZSTD, data=((0, 256),), body=BOMB),
    "cut frame": payload_of(kind=PageKind.ZSTD, data=((0, 1),), body=FRAME[:-1]),
    "two frames": payload_of(kind=PageKind.ZSTD, data=((0, 1),), body=FRAME + FRAME),
    "trailing byte": payload_of(kind=PageKind.ZSTD, data=((0, 1),), body=FRAME + b"\0"),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_no_encoder_writes_is_refused(payload: bytes) -> None:
    with pytest.raises(CodecError):
        decode(payload)


@pytest.mark.parametrize("size", [11, MAX_PAYLOAD_BYTES + 1])
def test_a_payload_is_measured_before_anything_of_it_is_read(size: int) -> None:
    with pytest.raises(CodecError, match="a batch has 12 to"):
        decode(bytes(size))


def test_a_frame_that_lies_about_its_size_gives_no_more_than_it_said() -> None:
    # The frame header: magic, descriptor, then the content size. The blocks hold more than it says.
    big = bytearray(zstandard.ZstdCompressor().compress(page(128) * 2))
    at = bytes(big).index(struct.pack("<H", 2 * PAGE_BYTES - 256))
    big[at : at + 2] = struct.pack("<H", PAGE_BYTES - 256)
    with pytest.raises(CodecError):
        decode(payload_of(kind=PageKind.ZSTD, data=((0, 1),), body=bytes(big)))


@given(st.binary(max_size=200))
@example(payload_of(zero=((0, 1),)))
@settings(deadline=None, max_examples=100)
def test_garbage_raises_only_codec_error(payload: bytes) -> None:
    with contextlib.suppress(CodecError):
        decode(payload)


@given(st.integers(0), st.integers(0, 255), st.sampled_from([None, 1]))
@settings(deadline=None, max_examples=100)
def test_a_broken_payload_is_refused_or_is_a_batch_within_bounds(
    at: int, octet: int, level: int | None
) -> None:
    payload, _ = encode(ram_of([1, 0, 128, 0, 7]), run((0, 5)), level)
    broken = bytearray(payload)
    broken[at % len(broken)] = octet
    try:
        batch = decode(broken)
    except CodecError:
        return
    check_runs(batch.zero_runs, TOTAL)
    check_runs(batch.data_runs, TOTAL)
    gfns = np.concatenate((expand(batch.zero_runs), expand(batch.data_runs)))
    assert len(np.unique(gfns)) == len(gfns)
    assert batch.pages.nbytes == pages_in(batch.data_runs) * PAGE_BYTES


def golden_batch() -> DecodedBatch:
    return DecodedBatch(
        zero_runs=run((0, 5), (6, 1)),
        data_runs=run((5, 1), (7, 1), (1000, 2)),
        pages=memoryview(page(1) + page(2) + page(3) * 2),
    )


@pytest.mark.parametrize(
    ("name", "is_delta"),
    [("batch_v1_raw.bin", False), ("batch_v1_zstd.bin", False), ("batch_v1_delta.bin", True)],
)
def test_golden_bytes_are_read_as_ever(name: str, is_delta: bool) -> None:
    batch, expected = decode((VECTORS / name).read_bytes()), golden_batch()
    assert batch.is_delta == is_delta
    assert batch.zero_runs.tolist() == expected.zero_runs.tolist()
    assert batch.data_runs.tolist() == expected.data_runs.tolist()
    assert batch.pages == expected.pages


def test_golden_bytes_are_written_as_ever() -> None:
    """Only RAW: zstd may choose other bytes in its next release, and any frame is read."""
    ram, expected = BytesRam(TOTAL), golden_batch()
    ram.scatter(expected.data_runs, expected.pages)
    payload, _ = encode(ram, run((0, 8), (1000, 2)), None)
    assert payload == (VECTORS / "batch_v1_raw.bin").read_bytes()
