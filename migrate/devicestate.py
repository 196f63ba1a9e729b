"""A guest's device state in parts: everything of a machine that is not its RAM, on the way with its last pages.

Law: no event loop. Parts are opaque; each is a payload of the data plane by itself and says where it belongs, because
two connections may deliver them in any order. What a peer sends allocates no more than the limits here.

A payload, little endian::

     0        1        2                 4                          12
    +--------+--------+-----------------+--------------------------+----------------
    | 0xD5   | is zstd| reserved, 0     | offset in the state      | the part
    |  u8    |  u8    | u16             | u64                      |
    +--------+--------+-----------------+--------------------------+----------------

The first byte tells it from a batch of pages, whose version is there.
"""

from __future__ import annotations

import struct
import threading
from typing import Final

import zstandard

__all__ = [
    "FAST_LINK_BYTES_PER_S",
    "MAX_DEVICE_STATE_BYTES",
    "STATE_MARK",
    "STATE_PART_BYTES",
    "StagedState",
    "StateInvalid",
    "pack_into",
    "parts_of",
    "unpack",
]

STATE_MARK: Final = 0xD5
# With the header it fits into the payload of a batch of 256 pages.
STATE_PART_BYTES: Final = 1 << 20
# QEMU's is 0.3 MiB for a bare machine and 0.9 MiB with many devices, and has the blocks of RAM that it does not share
# in it: firmware, and a display of up to 64 MiB in the largest that QEMU's own devices have.
MAX_DEVICE_STATE_BYTES: Final = 96 << 20
# What a link must carry, so that sending a part as it is takes no longer than compressing it does: 1 Gbit/s and more.
FAST_LINK_BYTES_PER_S: Final = 150e6
# Below this a part is a few packets anyway; above, level 1 takes 2.5 ms per MiB and QEMU's state shrinks to a fifth.
_MIN_ZSTD_BYTES: Final = 32 << 10
_HEADER: Final = struct.Struct("<BBHQ")


class StateInvalid(Exception):
    """Theirs: parts that no packer of ours gives."""


def parts_of(state: bytes) -> list[bytes]:
    """Cut a whole state into parts."""
    return [state[at : at + STATE_PART_BYTES] for at in range(0, len(state), STATE_PART_BYTES)]


def pack_into(out: memoryview, part: bytes, offset: int, *, is_link_slow: bool) -> int:
    """Write one part of at most STATE_PART_BYTES as a payload; give its length. Compressing takes some milliseconds."""
    body, is_zstd = part, False
    if is_link_slow and len(part) >= _MIN_ZSTD_BYTES:
        packed = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(part)
        if len(packed) < len(part):
            body, is_zstd = packed, True
    _HEADER.pack_into(out, 0, STATE_MARK, is_zstd, 0, offset)
    out[_HEADER.size : _HEADER.size + len(body)] = body
    return _HEADER.size + len(body)


def unpack(payload: memoryview) -> tuple[int, bytes]:
    """Give the offset and the part. Allocates at most STATE_PART_BYTES, whatever the payload says.

    Raises:
        StateInvalid: theirs.
    """
    if len(payload) <= _HEADER.size:
        raise StateInvalid(f"a part of the device state of {len(payload)} bytes")
    mark, is_zstd, reserved, offset = _HEADER.unpack_from(payload)
    if mark != STATE_MARK or is_zstd > 1 or reserved:
        raise StateInvalid("a part of the device state with an unknown header")
    body = payload[_HEADER.size :]
    if not is_zstd:
        if len(body) > STATE_PART_BYTES:
            raise StateInvalid(f"a part of {len(body)} bytes, at most {STATE_PART_BYTES} travel at once")
        return offset, bytes(body)
    try:
        said_bytes = zstandard.frame_content_size(body)
        if not 0 < said_bytes <= STATE_PART_BYTES:
            raise StateInvalid(f"a part of {said_bytes} bytes, at most {STATE_PART_BYTES} travel at once")
        part = zstandard.ZstdDecompressor(max_window_size=STATE_PART_BYTES).decompress(
            body, max_output_size=said_bytes, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as exc:
        raise StateInvalid(f"a part of the device state is no zstd frame: {exc}") from exc
    if len(part) != said_bytes:
        raise StateInvalid("a part of the device state is shorter than it says")
    return offset, part


class StagedState:
    """The parts that have arrived, in any order. Threads may add at once."""

    def __init__(self) -> None:
        self._parts: dict[int, bytes] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget all parts: they are of a stop that the guest has left again."""
        with self._lock:
            self._parts.clear()
            self._bytes = 0

    def add(self, payload: memoryview) -> None:
        """Keep one part. Raises StateInvalid: theirs; it is none, or more than any device state has."""
        offset, part = unpack(payload)
        with self._lock:
            if offset in self._parts:
                if self._parts[offset] != part:
                    raise StateInvalid(f"two different parts of the device state at byte {offset}")
                return
            if self._bytes + len(part) > MAX_DEVICE_STATE_BYTES:
                raise StateInvalid(f"a device state of more than {MAX_DEVICE_STATE_BYTES >> 20} MiB")
            self._parts[offset] = part
            self._bytes += len(part)

    def whole(self, state_bytes: int) -> bytes:
        """Give all of it, which has so many bytes. Raises StateInvalid: theirs; something is missing or overlaps."""
        with self._lock:
            ordered = sorted(self._parts.items())
        at = 0
        for offset, part in ordered:
            if offset != at:
                raise StateInvalid(f"the device state has no part at byte {at}")
            at += len(part)
        if at != state_bytes:
            raise StateInvalid(f"the device state has {at} bytes here, and {state_bytes} at the source")
        return b"".join(part for _, part in ordered)
