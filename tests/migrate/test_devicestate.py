from __future__ import annotations

import contextlib
import os
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from memory.codec import BATCH_VERSION, MAX_PAYLOAD_BYTES
from migrate.devicestate import (
    MAX_DEVICE_STATE_BYTES,
    STATE_MARK,
    STATE_PART_BYTES,
    StagedState,
    StateInvalid,
    pack_into,
    parts_of,
    unpack,
)

OUT = memoryview(bytearray(MAX_PAYLOAD_BYTES))


def packed(part: bytes, offset: int = 0, *, is_link_slow: bool = True) -> memoryview:
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    return out[: pack_into(out, part, offset, is_link_slow=is_link_slow)]


def header(is_zstd: int = 0, reserved: int = 0, offset: int = 0, mark: int = STATE_MARK) -> bytes:
    return struct.pack("<BBHQ", mark, is_zstd, reserved, offset)


@pytest.mark.parametrize("size", [1, 32 << 10, STATE_PART_BYTES])
@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("is_link_slow", [False, True])
def test_a_part_comes_back_as_it_was(size: int, is_random: bool, is_link_slow: bool) -> None:
    part = os.urandom(size) if is_random else bytes(size)
    payload = packed(part, 77, is_link_slow=is_link_slow)
    assert unpack(payload) == (77, part)
    assert len(payload) <= len(part) + 12
    assert (len(payload) < size / 2) is (is_link_slow and not is_random and size > 1000)


def test_a_part_is_never_taken_for_a_batch_of_pages() -> None:
    assert packed(b"x")[0] == STATE_MARK != BATCH_VERSION


def test_a_whole_state_is_cut_into_parts_without_loss() -> None:
    state = os.urandom(2 * STATE_PART_BYTES + 5)
    assert [len(part) for part in parts_of(state)] == [STATE_PART_BYTES, STATE_PART_BYTES, 5]
    assert b"".join(parts_of(state)) == state


def test_parts_may_come_in_any_order() -> None:
    staged = StagedState()
    for offset in (3, 0, 5):
        staged.add(packed(b"abcdef"[offset : {0: 3, 3: 5, 5: 6}[offset]], offset))
    assert staged.whole(6) == b"abcdef"


@pytest.mark.parametrize(("offsets", "total"), [((0,), 6), ((3,), 3), ((0, 2), 5), ((), 1)])
def test_a_state_with_a_gap_or_an_overlap_is_refused(offsets: tuple[int, ...], total: int) -> None:
    staged = StagedState()
    for offset in offsets:
        staged.add(packed(b"abc", offset))
    with pytest.raises(StateInvalid):
        staged.whole(total)


def test_no_state_at_all_is_a_state_of_no_bytes() -> None:
    assert StagedState().whole(0) == b""


def test_a_part_that_comes_twice_is_kept_once_and_another_in_its_place_is_refused() -> None:
    staged = StagedState()
    staged.add(packed(b"abc"))
    staged.add(packed(b"abc"))
    assert staged.whole(3) == b"abc"
    with pytest.raises(StateInvalid, match="two different"):
        staged.add(packed(b"abd"))


def test_more_than_any_device_state_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrate.devicestate.MAX_DEVICE_STATE_BYTES", 10)
    staged = StagedState()
    staged.add(packed(bytes(10)))
    with pytest.raises(StateInvalid):
        staged.add(packed(b"x", 10))
    assert MAX_DEVICE_STATE_BYTES > 64 << 20


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        header(),
        header(is_zstd=2) + b"x",
        header(reserved=1) + b"x",
        header(mark=1) + b"x",
        header() + bytes(STATE_PART_BYTES + 1),
        header(is_zstd=1) + zstandard.ZstdCompressor().compress(bytes(STATE_PART_BYTES + 1)),
        header(is_zstd=1) + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10)),
        header(is_zstd=1) + zstandard.ZstdCompressor().compress(bytes(1000))[:-1],
        header(is_zstd=1) + b"x",
    ],
)
def test_a_part_that_no_packer_gives_is_refused(hostile: bytes) -> None:
    with pytest.raises(StateInvalid):
        unpack(memoryview(hostile))


@given(st.binary(max_size=200))
def test_garbage_raises_only_its_own_error(content: bytes) -> None:
    with contextlib.suppress(StateInvalid):
        unpack(memoryview(content))
