from __future__ import annotations

from pathlib import Path

import pytest

from agents.hypervisors.embedded.devices import (
    CONSOLE_TAIL_BYTES,
    SECTOR_BYTES,
    Console,
    Disk,
    FileSectors,
    MemorySectors,
    NoSectors,
    Sectors,
)
from agents.hypervisors.embedded.errors import GuestGone, StateInvalid

WRITE, READ = 1, 2
DONE, FAILED, NO_DISK = 0, 1, 255


def command(disk: Disk, number: int, *, sector: int, address: int) -> tuple[int, int] | None:
    disk.port_out(Disk.PORT_SECTOR, sector)
    disk.port_out(Disk.PORT_ADDRESS, address)
    return disk.port_out(Disk.PORT_COMMAND, number)


def test_the_console_keeps_the_end_and_counts_all() -> None:
    console = Console()
    for byte in range(CONSOLE_TAIL_BYTES + 3):
        console.write(byte)
    assert console.printed_bytes == CONSOLE_TAIL_BYTES + 3
    assert console.tail == bytes(byte & 255 for byte in range(3, CONSOLE_TAIL_BYTES + 3))
    other = Console()
    other.load(console.state())
    assert other.state() == console.state()


@pytest.mark.parametrize(
    "state", [None, [], [1], [1, b""], [0, b"x"], [5000, b"x"], [-1, b""], [1, "x"], [1, b"x", 1]]
)
def test_a_console_takes_no_state_that_it_cannot_have(state: object) -> None:
    with pytest.raises(StateInvalid):
        Console().load(state)


def file_sectors(path: Path) -> FileSectors:
    path.write_bytes(bytes(8 * SECTOR_BYTES))
    return FileSectors(str(path))


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_is_written_to_a_disk_is_read_again(tmp_path: Path, kind: str) -> None:
    sectors: Sectors = file_sectors(tmp_path / "disk") if kind == "file" else MemorySectors()
    ram = memoryview(bytearray(4096))
    ram[0:512] = bytes(range(256)) * 2
    disk = Disk(sectors, ram)
    assert command(disk, WRITE, sector=7, address=0) is None
    assert disk.port_in(Disk.PORT_STATUS) == DONE
    assert command(disk, READ, sector=7, address=1024) == (1024, SECTOR_BYTES)
    assert ram[1024:1536] == ram[0:512]
    assert disk.sectors_written == 1
    sectors.close()
    if kind == "file":
        assert (tmp_path / "disk").read_bytes()[7 * 512 :] == ram[0:512]


def test_a_disk_fails_what_it_cannot_do_and_touches_nothing(tmp_path: Path) -> None:
    ram = memoryview(bytearray(4096))
    sectors = file_sectors(tmp_path / "disk")
    disk = Disk(sectors, ram)
    for number, sector, address in [
        (WRITE, 8, 0),
        (READ, 8, 0),
        (WRITE, 0, 4096 - 511),
        (READ, 0, 2**32 - 1),
        (3, 0, 0),
    ]:
        assert command(disk, number, sector=sector, address=address) is None
        assert disk.port_in(Disk.PORT_STATUS) == FAILED
    sectors.close()
    assert (tmp_path / "disk").read_bytes() == bytes(8 * SECTOR_BYTES)
    assert bytes(ram) == bytes(4096)


def test_the_last_sector_and_the_last_bytes_of_ram_can_be_used(tmp_path: Path) -> None:
    sectors = file_sectors(tmp_path / "disk")
    disk = Disk(sectors, memoryview(bytearray(4096)))
    command(disk, WRITE, sector=7, address=4096 - SECTOR_BYTES)
    assert disk.port_in(Disk.PORT_STATUS) == DONE
    sectors.close()


def test_a_machine_without_disk_says_so() -> None:
    disk = Disk(NoSectors(), memoryview(bytearray(4096)))
    assert disk.port_in(Disk.PORT_STATUS) == NO_DISK
    command(disk, WRITE, sector=0, address=0)
    assert disk.sectors_written == 0


def test_a_missing_disk_file_is_told_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(GuestGone, match="is the shared storage mounted"):
        FileSectors(str(tmp_path / "none"))


def test_a_disk_file_that_became_shorter_fails_the_read(tmp_path: Path) -> None:
    sectors = file_sectors(tmp_path / "disk")
    (tmp_path / "disk").write_bytes(b"short")
    assert sectors.read(0) is None
    sectors.close()


@pytest.mark.parametrize(
    "state", [None, [0, 0, 0], [-1, 0, 0, 0], [0, 2**32, 0, 0], [0, 0, 2, 0], [0, 0, 0, -1]]
)
def test_a_disk_takes_no_state_that_it_cannot_have(state: object) -> None:
    with pytest.raises(StateInvalid):
        Disk(NoSectors(), memoryview(bytearray(4096))).load(state)
