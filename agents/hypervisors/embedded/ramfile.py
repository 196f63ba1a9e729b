"""The guest's RAM inside its own process: one memfd, mapped once.

Law: the process that makes it owns it; agents get a duplicate of the fd and map it themselves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

from agents.hypervisors.embedded.errors import GuestGone
from memory.layout import Layout
from memory.ram import create_ram_file

__all__ = ["RAM_BLOCK", "RamFile", "ram_layout"]

RAM_BLOCK: Final = "ram"


def ram_layout(ram_bytes: int) -> Layout:
    """Give the one block of RAM that every embedded guest has."""
    return Layout.of_sizes([(RAM_BLOCK, ram_bytes)])


class RamFile:
    """RAM of `ram_bytes` zero bytes, without any memory behind it yet. Close it last."""

    def __init__(self, ram_bytes: int) -> None:
        self.ram_bytes = ram_bytes
        try:
            self.fd = create_ram_file(ram_layout(ram_bytes), "vmferry-guest-ram")
        except OSError as exc:
            raise GuestGone(f"this host cannot make {ram_bytes} bytes of guest RAM: {exc}") from exc
        try:
            self._mapping = mmap.mmap(self.fd, ram_bytes)
            self._mapping.madvise(mmap.MADV_DONTDUMP)
        except (OSError, ValueError) as exc:
            os.close(self.fd)
            raise GuestGone(f"this host cannot map {ram_bytes} bytes of guest RAM: {exc}") from exc
        anchor = ctypes.c_char.from_buffer(self._mapping)
        self.address = ctypes.addressof(anchor)
        del anchor
        self.view = memoryview(self._mapping)

    def write(self, address: int, content: bytes | memoryview) -> None:
        """Store without touching the mapping: `pwrite` of new pages is cheaper than faults, and can refuse.

        Raises:
            GuestGone: the world's: no memory left.
        """
        try:
            os.pwrite(self.fd, content, address)
        except OSError as exc:
            raise GuestGone(f"no memory left on this host for the guest's RAM: {exc.strerror}") from exc

    def close(self) -> None:
        """Let go of the RAM; nothing may run on it any more."""
        self.view.release()
        self._mapping.close()
        os.close(self.fd)
