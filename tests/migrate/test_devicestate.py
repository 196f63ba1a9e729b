from __future__ import annotations

import contextlib
import os

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from migrate.devicestate import STATE_PART_BYTES, StateInvalid, pack, parts_of, unpack
from migrate.messages import State


@pytest.mark.parametrize("size", [0, 1, 32 << 10, STATE_PART_BYTES])
@pytest.mark.parametrize("is_random", [False, True])
def test_a_part_comes_back_as_it_was(size: int, is_random: bool) -> None:
    part = os.urandom(size) if is_random else bytes(size)
    packed = pack(part)
    assert unpack(packed) == part
    assert len(packed.content) <= len(part)


def test_a_part_that_compresses_travels_compressed() -> None:
    assert pack(bytes(64 << 10)).is_zstd
    assert not pack(os.urandom(64 << 10)).is_zstd


def test_a_whole_state_is_cut_into_parts_without_loss() -> None:
    state = os.urandom(2 * STATE_PART_BYTES + 5)
    parts = parts_of(state)
    assert [len(part) for part in parts] == [STATE_PART_BYTES, STATE_PART_BYTES, 5]
    assert b"".join(parts) == state


@pytest.mark.parametrize(
    "hostile",
    [
        State(content=bytes(STATE_PART_BYTES + 1), is_zstd=False, is_early=False),
        State(
            content=zstandard.ZstdCompressor().compress(bytes(STATE_PART_BYTES + 1)),
            is_zstd=True,
            is_early=False,
        ),
        State(
            content=zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10)),
            is_zstd=True,
            is_early=False,
        ),
        State(content=zstandard.ZstdCompressor().compress(bytes(1000))[:-1], is_zstd=True, is_early=False),
        State(content=b"", is_zstd=True, is_early=False),
    ],
)
def test_a_part_that_no_packer_gives_is_refused(hostile: State) -> None:
    with pytest.raises(StateInvalid):
        unpack(hostile)


@given(st.binary(max_size=200))
def test_garbage_raises_only_its_own_error(content: bytes) -> None:
    with contextlib.suppress(StateInvalid):
        unpack(State(content=content, is_zstd=True, is_early=False))
