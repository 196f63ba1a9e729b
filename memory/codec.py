"""The wire format of one batch of pages, and the two who write and read it.

Law: pure; no clock but the one that is given. A batch is encoded from a copy of the pages made once, because the guest
goes on writing; what is decoded is refused unless an encoder could have written it.

A payload, little endian, version 1::

     0        1        2                 4                 6                 8                12
    +--------+--------+-----------------+-----------------+-----------------+-----------------+
    |version | data   | zero runs       | data runs       | reserved, 0     | data bytes      |
    |  u8    | kind u8| u16             | u16             | u16             | u32             |
    +--------+--------+-----------------+-----------------+-----------------+-----------------+
    | zero runs, then data runs, 12 bytes each:  u64 first gfn | u32 pages                    |
    +-----------------------------------------------------------------------------------------+
    | the pages of the data runs, in order: RAW as they are, ZSTD as one frame with its size, |
    | DELTA as such a frame of what the XOR of each page with what the receiver has of it is  |
    +-----------------------------------------------------------------------------------------+

Zero and data runs together name every page once. Each table is sorted. A run of zeros may have any number of pages:
a hole of a large guest is one row. Data pages are at most MAX_BATCH_PAGES. Without data pages the kind is RAW.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from memory.digest import RamDigest, page_views
from memory.errors import CodecError
from memory.history import PageHistory, Pages
from memory.layout import PAGE_BYTES
from memory.runs import Runs, check_runs, empty_runs, expand, pages_in, runs_of_gfns, union

__all__ = [
    "BATCH_VERSION",
    "MAX_BATCH_PAGES",
    "MAX_DATA_BYTES",
    "MAX_KEPT_ZERO_PAGES",
    "MAX_PAYLOAD_BYTES",
    "MAX_RUNS",
    "MIN_DELTA_GAIN",
    "BatchDecoder",
    "BatchEncoder",
    "BatchStats",
    "DecodedBatch",
    "GatheredRam",
    "PageKind",
]

BATCH_VERSION = 1
# 1 MiB of pages. From 64 KiB to 4 MiB zstd's ratio changes by 2 %; smaller batches cost 7-22 % more CPU in the
# transport (two guests of 1 GiB, zstd 1, 2 connections), larger ones make the last batch of a stop-copy late.
MAX_BATCH_PAGES = 256
MAX_DATA_BYTES = MAX_BATCH_PAGES * PAGE_BYTES
# Both tables together. 256 data pages need at most 256 rows; the rest is for holes: 48 KiB of rows in one payload.
MAX_RUNS = 4096

_HEADER = struct.Struct("<BBHHHI")
_RUN = np.dtype([("first_gfn", "<u8"), ("pages", "<u4")])
MAX_PAYLOAD_BYTES = _HEADER.size + MAX_RUNS * _RUN.itemsize + MAX_DATA_BYTES

# Zeros that wait for the next payload: rows that leave room for those of one more batch, and pages that are found in
# some 20 ms, so that a guest of nothing else still shows progress.
MAX_KEPT_ROWS = MAX_RUNS - 3 * MAX_BATCH_PAGES
MAX_KEPT_ZERO_PAGES = 16384
_NO_RUNS = empty_runs()

# A batch that zstd shrinks by less goes RAW: the destination saves more CPU than the link gains.
_MIN_GAIN = 16
# A delta that is not a half of the pages is none: they were written anew, and plain zstd does as well.
MIN_DELTA_GAIN = 2
# Deltas are mostly zeros: level 1 shrinks them at 4 GB/s, and no higher level by more that would be noticed.
_DELTA_LEVEL = 1
_WORDS = PAGE_BYTES // 8


class PageKind(IntEnum):
    """How a page travels. The values are on the wire."""

    ZERO = 0
    RAW = 1
    ZSTD = 2
    DELTA = 3


class GatheredRam(Protocol):
    """What encoding needs of a RAM; the engine's GuestRam has it."""

    def gather(self, runs: Runs, out: memoryview) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """What became of one batch.

    `data_payload_bytes` is the data's share of `payload_bytes`; `compress_s` is time in zstd by the encoder's clock,
    also when the result was thrown away.
    """

    payload_bytes: int
    zero_pages: int
    raw_pages: int
    zstd_pages: int
    data_payload_bytes: int
    compress_s: float
    delta_pages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedBatch:
    """One batch as it was at the source. `pages` may be a view of the payload: it is valid as long as that.

    Of a delta `pages` are what is to be XORed to the pages as they are at the receiver.
    """

    zero_runs: Runs
    data_runs: Runs
    pages: memoryview
    is_delta: bool = False


class BatchEncoder:
    """Writes payloads. One per worker thread: it keeps 2 MiB of scratch, 3 with a history, and a compressor.

    Args:
        digest: is updated with every page that is written to a payload.
        history: has the bases of deltas, and is given what is sent. None: there are no deltas.
        clock: seconds, for `compress_s`; time.thread_time counts the CPU of the worker alone. None: not measured, 0.0.
    """

    def __init__(
        self,
        digest: RamDigest | None,
        *,
        history: PageHistory | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._digest = digest
        self._history = history or PageHistory(0)
        self._clock = clock
        self._gathered = np.empty((MAX_BATCH_PAGES, _WORDS), dtype=np.uint64)
        self._compacted = np.empty((MAX_BATCH_PAGES, _WORDS), dtype=np.uint64)
        self._gathered_views = page_views(self._gathered.data)
        self._compacted_views = page_views(self._compacted.data)
        self._differences: Pages | None = None
        self._compressor: tuple[int, zstandard.ZstdCompressor] | None = None
        self._zero_runs: list[Runs] = []
        self.clear()

    def encode_into(self, ram: GatheredRam, runs: Runs, out: memoryview, *, level: int | None) -> BatchStats:
        """Write the pages of `runs` to the start of `out`: `load` and `write` in one."""
        self.clear()
        self.load(ram, runs)
        return self.write(out, level=level)

    def clear(self) -> None:
        """Forget what was loaded and not written."""
        self._zero_runs.clear()
        self._zero_rows = self._zero_pages = 0
        self._data_runs, self._data, self._delta = _NO_RUNS, memoryview(b""), memoryview(b"")

    def load(self, ram: GatheredRam, runs: Runs, *, is_kept: bool = True, as_delta: bool = False) -> bool:
        """Take the pages of `runs`, at most MAX_BATCH_PAGES and at least one; say whether to `write` now.

        The pages are copied from `ram` once; zero pages are found, the digest is updated and data is compressed on that
        copy. Pages that are all zero need no payload of their own: they are kept for the next one, so that a stretch
        of zeros costs a row and not a record for each MiB.

        `is_kept`: the history may have room for copies of these pages. `as_delta`: it has a base of each, and the
        next `write` may send the difference.
        """
        pages = pages_in(runs)
        if not 1 <= pages <= MAX_BATCH_PAGES:
            raise ValueError(f"a batch has 1 to {MAX_BATCH_PAGES} pages, not {pages}")
        if len(self._data_runs):
            raise ValueError("a batch is loaded already: write it first")
        ram.gather(runs, self._gathered.data.cast("B"))
        words = self._gathered[:pages]
        delta = self._remember(runs, words, as_delta) if is_kept else None
        # On a batch in cache 43 GiB/s, where any(axis=1) makes 18 (2 vCPUs).
        is_data = np.bitwise_or.reduce(words, axis=1) != 0
        views = self._gathered_views
        if is_data.all():
            zero_runs, data_runs = _NO_RUNS, runs
        elif not is_data.any():
            zero_runs, data_runs, words, delta = runs, _NO_RUNS, words[:0], None
        else:
            gfns = expand(runs)
            zero_runs, data_runs = runs_of_gfns(gfns[~is_data]), runs_of_gfns(gfns[is_data])
            kept = np.flatnonzero(is_data)
            # mode="clip" writes straight to `out`; the default mode makes a copy first, to be able to fail.
            words = np.take(words, kept, axis=0, out=self._compacted[: len(kept)], mode="clip")
            views = self._compacted_views
            delta = None if delta is None else delta[kept]
        self._data = _octets(words)
        self._delta = memoryview(b"") if delta is None else _octets(delta)
        self._data_runs = data_runs
        if self._digest is not None and len(data_runs):
            self._digest.update(data_runs, views[: len(words)])
        if len(zero_runs):
            if self._digest is not None:
                self._digest.update_zeros(zero_runs)
            self._zero_runs.append(zero_runs)
            self._zero_rows += len(zero_runs)
            self._zero_pages += pages_in(zero_runs)
        return (
            len(data_runs) > 0 or self._zero_rows > MAX_KEPT_ROWS or self._zero_pages >= MAX_KEPT_ZERO_PAGES
        )

    def write(self, out: memoryview, *, level: int | None) -> BatchStats:
        """Write what was loaded to the start of `out`, which has MAX_PAYLOAD_BYTES; a payload of 0 when nothing was.

        `level` is zstd's, None sends data as it is.
        """
        _check_room(out)
        data, data_runs = self._data, self._data_runs
        # The rows of neighbours that touch become one.
        zero_runs = union(np.concatenate(self._zero_runs), _NO_RUNS) if self._zero_runs else _NO_RUNS
        if not len(zero_runs) and not len(data_runs):
            return BatchStats(
                payload_bytes=0, zero_pages=0, raw_pages=0, zstd_pages=0, data_payload_bytes=0, compress_s=0.0
            )
        kind, body, compress_s = self._pack(level)
        payload_bytes = _write(out, kind, zero_runs, data_runs, body)
        data_pages = len(data) // PAGE_BYTES
        stats = BatchStats(
            payload_bytes=payload_bytes,
            zero_pages=self._zero_pages,
            raw_pages=data_pages if kind is PageKind.RAW else 0,
            zstd_pages=data_pages if kind is PageKind.ZSTD else 0,
            delta_pages=data_pages if kind is PageKind.DELTA else 0,
            data_payload_bytes=len(body),
            compress_s=compress_s,
        )
        self.clear()
        return stats

    def _remember(self, runs: Runs, words: Pages, as_delta: bool) -> Pages | None:
        """Store what is about to be sent; give its difference to what was sent last, where that is wanted."""
        if not as_delta:
            self._history.store(runs, words)
            return None
        if self._differences is None:
            self._differences = np.empty((MAX_BATCH_PAGES, _WORDS), dtype=np.uint64)
        delta = self._differences[: len(words)]
        self._history.exchange(runs, words, delta)
        return delta

    def _pack(self, level: int | None) -> tuple[PageKind, memoryview | bytes, float]:
        """Give the kind that the data goes as, the bytes of that, and the seconds spent in zstd."""
        data, spent_s = self._data, 0.0
        if self._delta:
            body, spent_s = self._compress(self._delta, _DELTA_LEVEL)
            if len(body) * MIN_DELTA_GAIN <= len(data):
                return PageKind.DELTA, body, spent_s
        if level is None or len(data) == 0:
            return PageKind.RAW, data, spent_s
        body, took_s = self._compress(data, level)
        spent_s += took_s
        if len(body) <= len(data) - len(data) // _MIN_GAIN:
            return PageKind.ZSTD, body, spent_s
        return PageKind.RAW, data, spent_s

    def _compress(self, data: memoryview, level: int) -> tuple[bytes, float]:
        """Give one zstd frame, and the seconds spent."""
        if self._compressor is None or self._compressor[0] != level:
            self._compressor = (level, zstandard.ZstdCompressor(level=level, write_content_size=True))
        began_s = self._clock() if self._clock is not None else 0.0
        body = self._compressor[1].compress(data)
        return body, (self._clock() - began_s if self._clock is not None else 0.0)


class BatchDecoder:
    """Reads payloads for a guest of `total_pages` pages. One per worker thread."""

    def __init__(self, total_pages: int) -> None:
        self._total_pages = total_pages
        # One frame of at most 1 MiB needs no larger window: a hostile frame cannot make zstd allocate more.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_DATA_BYTES)

    def decode(self, payload: memoryview) -> DecodedBatch:
        """Read one payload. Allocates at most 1 MiB beside the tables, whatever the payload says.

        Raises:
            CodecError: theirs: the payload is nothing that an encoder writes.
        """
        octets = payload.cast("B")
        if not _HEADER.size <= len(octets) <= MAX_PAYLOAD_BYTES:
            raise CodecError(f"a batch has {_HEADER.size} to {MAX_PAYLOAD_BYTES} bytes, not {len(octets)}")
        version, kind, zero_rows, data_rows, reserved, data_bytes = _HEADER.unpack_from(octets)
        rows = zero_rows + data_rows
        body_at = _HEADER.size + rows * _RUN.itemsize
        if version != BATCH_VERSION:
            raise CodecError(f"batch version {version}, this is {BATCH_VERSION}")
        if kind not in (PageKind.RAW, PageKind.ZSTD, PageKind.DELTA) or reserved != 0:
            raise CodecError(f"unknown kind of data {kind} or reserved bits {reserved}")
        if not 1 <= rows <= MAX_RUNS:
            raise CodecError(f"a batch has 1 to {MAX_RUNS} runs, not {rows}")
        if body_at + data_bytes != len(octets):
            raise CodecError(f"{len(octets)} bytes where the header says {body_at + data_bytes}")
        table = np.frombuffer(octets, dtype=_RUN, count=rows, offset=_HEADER.size)
        runs = np.empty((rows, 2), dtype=np.int64)
        runs[:, 0] = table["first_gfn"].astype(np.int64)  # 2**63 and more become negative: check_runs
        runs[:, 1] = table["pages"]
        zero_runs, data_runs = runs[:zero_rows], runs[zero_rows:]
        check_runs(zero_runs, self._total_pages)
        check_runs(data_runs, self._total_pages)
        if zero_rows and data_rows:
            check_runs(runs[np.argsort(runs[:, 0], kind="stable")], self._total_pages)
        pages = pages_in(data_runs)
        if pages > MAX_BATCH_PAGES:
            raise CodecError(f"{pages} data pages, at most {MAX_BATCH_PAGES} travel in one batch")
        body = self._unpack(PageKind(kind), octets[body_at:], pages * PAGE_BYTES)
        is_delta = kind == PageKind.DELTA
        return DecodedBatch(zero_runs=zero_runs, data_runs=data_runs, pages=body, is_delta=is_delta)

    def _unpack(self, kind: PageKind, body: memoryview, wanted_bytes: int) -> memoryview:
        if kind is PageKind.RAW:
            if len(body) != wanted_bytes:
                raise CodecError(f"{len(body)} bytes of data for {wanted_bytes} bytes of pages")
            return body
        if wanted_bytes == 0:
            raise CodecError("compressed data without a page")
        try:
            # zstandard allocates what the frame says it holds, so that is compared first.
            said_bytes = zstandard.frame_content_size(body)
            if said_bytes != wanted_bytes:
                raise CodecError(f"a frame of {said_bytes} bytes for {wanted_bytes} bytes of pages")
            pages = self._decompressor.decompress(
                body, max_output_size=wanted_bytes, read_across_frames=False, allow_extra_data=False
            )
        except zstandard.ZstdError as exc:
            raise CodecError(f"data is no zstd frame: {exc}") from exc
        if len(pages) != wanted_bytes:
            raise CodecError(f"a frame gave {len(pages)} bytes for {wanted_bytes} bytes of pages")
        return memoryview(pages)


def _octets(words: Pages) -> memoryview:
    """Give rows of words as bytes; of no rows numpy gives no buffer that could be cast."""
    return words.data.cast("B") if len(words) else memoryview(b"")


def _check_room(out: memoryview) -> None:
    if out.nbytes < MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload needs room for {MAX_PAYLOAD_BYTES} bytes, not {out.nbytes}")


def _write(
    out: memoryview, kind: PageKind, zero_runs: Runs, data_runs: Runs, body: memoryview | bytes
) -> int:
    """Write one payload and give its length."""
    zero_rows, data_rows = len(zero_runs), len(data_runs)
    _HEADER.pack_into(out, 0, BATCH_VERSION, kind, zero_rows, data_rows, 0, len(body))
    table: NDArray[np.void] = np.frombuffer(out, dtype=_RUN, count=zero_rows + data_rows, offset=_HEADER.size)
    table["first_gfn"][:zero_rows], table["pages"][:zero_rows] = zero_runs[:, 0], zero_runs[:, 1]
    table["first_gfn"][zero_rows:], table["pages"][zero_rows:] = data_runs[:, 0], data_runs[:, 1]
    body_at = _HEADER.size + table.nbytes
    out[body_at : body_at + len(body)] = body
    return body_at + len(body)
