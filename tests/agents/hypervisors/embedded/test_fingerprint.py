from __future__ import annotations

from agents.hypervisors.embedded.fingerprint import ram_fingerprint
from agents.hypervisors.embedded.ramfile import RamFile

RAM_BYTES = 3 << 20


def of(ram: RamFile) -> bytes:
    return ram_fingerprint(ram.fd, ram.ram_bytes)


def test_a_hole_equals_a_page_of_zeros_and_stays_a_hole() -> None:
    holes, zeros = RamFile(RAM_BYTES), RamFile(RAM_BYTES)
    for ram in (holes, zeros):
        ram.write(1 << 20, b"content" * 1000)
    zeros.write(0x5000, bytes(8192))
    zeros.write(RAM_BYTES - 4096, bytes(4096))
    assert of(holes) == of(zeros)
    holes.close()
    zeros.close()


def test_every_byte_and_every_place_counts() -> None:
    seen = set()
    for address, content in [
        (0, b"\1"),
        (0, b"\2"),
        (1, b"\1"),
        (4096, b"\1"),
        (1 << 20, b"\1"),
        (RAM_BYTES - 1, b"\1"),
    ]:
        ram = RamFile(RAM_BYTES)
        ram.write(address, content)
        seen.add(of(ram))
        ram.close()
    assert len(seen) == 6


def test_empty_rams_of_two_sizes_differ() -> None:
    small, large = RamFile(RAM_BYTES), RamFile(2 * RAM_BYTES)
    assert of(small) != of(large)
    small.close()
    large.close()
