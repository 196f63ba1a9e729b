"""The guest's devices: a console that takes bytes, and a disk that is a file.

Law: deterministic towards the guest, and all of their state goes into the device state. No emulator in here;
`machine` connects them to the CPU's port instructions.
"""

from __future__ import annotations

import os
from typing import Final, Protocol

from agents.hypervisors.embedded.errors import GuestGone, StateInvalid

__all__ = [
    "CONSOLE_TAIL_BYTES",
    "SECTOR_BYTES",
    "Console",
    "Disk",
    "FileSectors",
    "MemorySectors",
    "NoSectors",
    "Sectors",
]

SECTOR_BYTES: Final = 512
# Enough for what a person looks at; it is part of the device state, which travels during the downtime.
CONSOLE_TAIL_BYTES: Final = 1024
_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1

_WRITE: Final = 1
_READ: Final = 2
_DONE: Final = 0
_FAILED: Final = 1
_NO_DISK: Final = 255


class Console:
    """Takes what the guest prints; keeps the end of it."""

    PORT: Final = 0x3F8

    def __init__(self) -> None:
        self.tail = bytearray()
        self.printed_bytes = 0

    def write(self, byte: int) -> None:
        self.printed_bytes += 1
        self.tail.append(byte & 0xFF)
        if len(self.tail) > CONSOLE_TAIL_BYTES:
            del self.tail[0]

    def state(self) -> list[object]:
        return [self.printed_bytes, bytes(self.tail)]

    def load(self, state: object) -> None:
        """Raises StateInvalid: theirs."""
        match state:
            case [int(printed_bytes), bytes(tail)] if len(tail) <= CONSOLE_TAIL_BYTES and len(tail) == min(
                printed_bytes, CONSOLE_TAIL_BYTES
            ):
                self.printed_bytes = printed_bytes
                self.tail = bytearray(tail)
            case _:
                raise StateInvalid("the console's state cannot be read")


class Sectors(Protocol):
    """What keeps the sectors of a disk."""

    @property
    def is_there(self) -> bool: ...
    def read(self, sector: int) -> bytes | None:
        """Give the sector, or None when it cannot be read."""
        ...

    def write(self, sector: int, content: bytes) -> bool:
        """Keep the sector durably; say whether it worked."""
        ...

    def close(self) -> None: ...


class NoSectors:
    """A machine without a disk."""

    is_there = False

    def read(self, sector: int) -> bytes | None:
        return None

    def write(self, sector: int, content: bytes) -> bool:
        return False

    def close(self) -> None:
        return None


class MemorySectors:
    """A disk that forgets: for the unmoved run of a replay, which must not write to the real one."""

    is_there = True

    def __init__(self) -> None:
        self._sectors: dict[int, bytes] = {}

    def read(self, sector: int) -> bytes | None:
        return self._sectors.get(sector, bytes(SECTOR_BYTES))

    def write(self, sector: int, content: bytes) -> bool:
        self._sectors[sector] = content
        return True

    def close(self) -> None:
        self._sectors.clear()


class FileSectors:
    """A disk that is a file on the shared storage.

    O_DSYNC: a sector is on the storage when the guest's write ends, so that a paused guest has nothing to
    flush in the downtime and the other host reads what this one wrote.

    Raises:
        GuestGone: the world's: there is no such file, or it cannot be written.
    """

    is_there = True

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as exc:
            raise GuestGone(
                f"the disk {path} cannot be opened: {exc.strerror}; is the shared storage mounted on this host?"
            ) from exc
        self._sectors = os.fstat(self._fd).st_size // SECTOR_BYTES

    def read(self, sector: int) -> bytes | None:
        if sector >= self._sectors:
            return None
        try:
            content = os.pread(self._fd, SECTOR_BYTES, sector * SECTOR_BYTES)
        except OSError:
            return None
        return content if len(content) == SECTOR_BYTES else None

    def write(self, sector: int, content: bytes) -> bool:
        if sector >= self._sectors:
            return False
        try:
            return os.pwrite(self._fd, content, sector * SECTOR_BYTES) == SECTOR_BYTES
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._fd)


class Disk:
    """A disk controller of four registers: sector, address in RAM, command, status.

    A command is done when the instruction that gives it ends, so a paused machine has none under way.
    """

    PORT_SECTOR: Final = 0x500
    PORT_ADDRESS: Final = 0x504
    PORT_COMMAND: Final = 0x508
    PORT_STATUS: Final = 0x50C

    def __init__(self, sectors: Sectors, ram: memoryview) -> None:
        self._sectors = sectors
        self._ram = ram
        self._sector = 0
        self._address = 0
        self._status = _DONE
        self.sectors_written = 0

    def port_in(self, port: int) -> int:
        if port != self.PORT_STATUS:
            return _U32
        return self._status if self._sectors.is_there else _NO_DISK

    def port_out(self, port: int, value: int) -> tuple[int, int] | None:
        """Take one register write; give (address, bytes) of the RAM that the device wrote by it, if any."""
        match port:
            case self.PORT_SECTOR:
                self._sector = value & _U32
            case self.PORT_ADDRESS:
                self._address = value & _U32
            case self.PORT_COMMAND:
                return self._command(value)
            case _:
                pass
        return None

    def _command(self, command: int) -> tuple[int, int] | None:
        self._status = _FAILED
        end = self._address + SECTOR_BYTES
        if end > len(self._ram):
            return None
        if command == _WRITE and self._sectors.write(self._sector, bytes(self._ram[self._address : end])):
            self.sectors_written += 1
            self._status = _DONE
        elif command == _READ:
            content = self._sectors.read(self._sector)
            if content is not None:
                self._ram[self._address : end] = content
                self._status = _DONE
                return self._address, SECTOR_BYTES
        return None

    def state(self) -> list[object]:
        return [self._sector, self._address, self._status, self.sectors_written]

    def load(self, state: object) -> None:
        """Raises StateInvalid: theirs."""
        match state:
            case [int(sector), int(address), int(status), int(sectors_written)] if (
                0 <= sector <= _U32
                and 0 <= address <= _U32
                and status in (_DONE, _FAILED)
                and 0 <= sectors_written <= _U64
            ):
                self._sector, self._address, self._status = sector, address, status
                self.sectors_written = sectors_written
            case _:
                raise StateInvalid("the disk's state cannot be read")
