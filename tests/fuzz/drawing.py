"""Values out of fuzz bytes, first byte first: how a target turns an input into numbers, words and choices.

Law: pure; an input of any length is enough. Where bytes have run out, zeros are read, which every target takes as
"nothing more". A small change of the input is a small change of what is drawn, so that mutations mean something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

__all__ = ["NUMBERS", "Draw", "once", "stretched"]

T = TypeVar("T")

# Where counts and sizes have their edges. 64 bits are what msgpack carries.
NUMBERS: Final = (
    *(0, 1, -1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 4095, 4096, 4097, 65535, 65536, 100_000),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48 - 1, 2**48, 2**63 - 1, -(2**63), 2**63, 2**64 - 1),
)
_LITERAL: Final = 0xFF
_REPEATED: Final = 0xF0


class Draw:
    """What is left of one input."""

    def __init__(self, data: bytes) -> None:
        self._data: Final = data
        self._at = 0

    @property
    def is_left(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        return int.from_bytes(self.take(1), "big")

    def take(self, count: int) -> bytes:
        """Give `count` bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def rest(self) -> bytes:
        """Give everything that is left."""
        return self.take(max(len(self._data) - self._at, 0))

    def sized(self) -> bytes:
        """Give bytes whose number, up to 65535, stands before them in two."""
        return self.take(int.from_bytes(self.take(2), "big"))

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def pick(self, options: Sequence[T]) -> T:
        """Give one of at most 256."""
        return options[self.byte() % len(options)]

    def number(self) -> int:
        """Give an edge of some range, or with a first byte of 255 what the next eight bytes say, signed."""
        which = self.byte()
        if which == _LITERAL:
            return int.from_bytes(self.take(8), "big", signed=True)
        return NUMBERS[which % len(NUMBERS)]


def once(data: bytes) -> bytes:
    """Write `data` so that `stretched` gives it back as it is."""
    return b"\0" + data


def stretched(data: bytes, most_bytes: int) -> bytes:
    """Read an input that may be short for a long one: how work grows with length shows only at length.

    A first byte below 0xF0 is followed by the input itself. From there on a second byte says how many of the bytes
    after it stand once; the others are repeated until there are `most_bytes`.
    """
    if not data or data[0] < _REPEATED:
        return data[1 : 1 + most_bytes]
    prefix, unit = (
        data[2 : 2 + data[1]] if len(data) > 1 else b"",
        data[2 + data[1] :] if len(data) > 1 else b"",
    )
    if not unit:
        return prefix[:most_bytes]
    return (prefix + unit * (most_bytes // len(unit) + 1))[:most_bytes]
