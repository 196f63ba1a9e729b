"""A guest's device state in parts, packed for the wire: everything of a machine that is not its RAM.

Law: pure. Parts are opaque here; a part is a limit of memory and nothing else.
"""

from __future__ import annotations

from typing import Final

import zstandard

from migrate.messages import State

__all__ = [
    "FAST_LINK_BYTES_PER_S",
    "MAX_DEVICE_STATE_BYTES",
    "STATE_PART_BYTES",
    "StateInvalid",
    "pack",
    "parts_of",
    "unpack",
]

STATE_PART_BYTES: Final = 1 << 20
# QEMU's is 0.3 MiB for a bare machine and 0.9 MiB with many devices, and has the blocks of RAM that it does not share
# in it: firmware, and a display of up to 64 MiB in the largest that QEMU's own devices have.
MAX_DEVICE_STATE_BYTES: Final = 96 << 20
# What a link must carry, so that sending a part as it is takes no longer than compressing it does: 1 Gbit/s and more.
FAST_LINK_BYTES_PER_S: Final = 150e6
# Below this a part is a few packets anyway; above, level 1 takes 2.5 ms per MiB and QEMU's state shrinks to a fifth.
_MIN_ZSTD_BYTES: Final = 32 << 10


class StateInvalid(Exception):
    """Theirs: a part that no packer of ours gives."""


def parts_of(state: bytes) -> list[bytes]:
    """Cut a whole state into parts."""
    return [state[at : at + STATE_PART_BYTES] for at in range(0, len(state), STATE_PART_BYTES)]


def pack(part: bytes, *, is_early: bool = False, is_link_slow: bool = True) -> State:
    """Pack one part of at most STATE_PART_BYTES; compressing takes some milliseconds."""
    if len(part) >= _MIN_ZSTD_BYTES and is_link_slow:
        content = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(part)
        if len(content) < len(part):
            return State(content=content, is_zstd=True, is_early=is_early)
    return State(content=part, is_zstd=False, is_early=is_early)


def unpack(state: State) -> bytes:
    """Give the part back. Allocates at most STATE_PART_BYTES, whatever the message says.

    Raises:
        StateInvalid: theirs.
    """
    if not state.is_zstd:
        if len(state.content) > STATE_PART_BYTES:
            raise StateInvalid(
                f"a part of {len(state.content)} bytes, at most {STATE_PART_BYTES} travel at once"
            )
        return state.content
    try:
        said_bytes = zstandard.frame_content_size(state.content)
        if not 0 < said_bytes <= STATE_PART_BYTES:
            raise StateInvalid(f"a part of {said_bytes} bytes, at most {STATE_PART_BYTES} travel at once")
        part = zstandard.ZstdDecompressor(max_window_size=STATE_PART_BYTES).decompress(
            state.content, max_output_size=said_bytes, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as exc:
        raise StateInvalid(f"a part of the device state is no zstd frame: {exc}") from exc
    if len(part) != said_bytes:
        raise StateInvalid("a part of the device state is shorter than it says")
    return part
