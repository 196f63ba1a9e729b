"""A pool of record buffers in a few sizes, so that small records hold little memory and none is made twice.

Law: not thread-safe, and bounded: what is free and what is lent together never pass the limit by more than what
is lent itself needs. Who lends bounds that (the ledger's window).
"""

from __future__ import annotations

from typing import Final

__all__ = ["BufferPool", "capacity_for"]

_SMALLEST_BYTES: Final = 4096


def capacity_for(wanted_bytes: int) -> int:
    """The size class of a buffer: at most an eighth more than wanted, from 4 KiB up."""
    step = max(_SMALLEST_BYTES, 1 << max(0, wanted_bytes.bit_length() - 4))
    return max(1, -(-wanted_bytes // step)) * step


class BufferPool:
    """Buffers that are lent and given back. Fresh memory costs page faults: about 0.25 ms a MiB."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes: Final = limit_bytes
        self._free: dict[int, list[bytearray]] = {}
        self._free_bytes = 0
        self._lent_bytes = 0

    @property
    def total_bytes(self) -> int:
        """All memory of the pool, lent or free."""
        return self._free_bytes + self._lent_bytes

    def lend(self, wanted_bytes: int) -> bytearray:
        """Give a buffer of `capacity_for(wanted_bytes)`; its content is whatever was in it."""
        capacity = capacity_for(wanted_bytes)
        same_size = self._free.get(capacity)
        self._lent_bytes += capacity
        if same_size:
            self._free_bytes -= capacity
            return same_size.pop()
        for size, buffers in self._free.items():
            while buffers and self.total_bytes > self._limit_bytes:
                buffers.pop()
                self._free_bytes -= size
        return bytearray(capacity)

    def give_back(self, buffer: bytearray) -> None:
        """Take a lent buffer back; nobody may use it any more."""
        self._lent_bytes -= len(buffer)
        if self.total_bytes + len(buffer) <= self._limit_bytes:
            self._free.setdefault(len(buffer), []).append(buffer)
            self._free_bytes += len(buffer)
