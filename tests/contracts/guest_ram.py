"""What every migrate.ports.GuestRam must do."""

from __future__ import annotations

import numpy as np
import pytest

from memory.layout import PAGE_BYTES
from memory.runs import Runs, expand, intersect, pages_in
from migrate.ports import GuestRam

__all__ = ["GuestRamContract"]

TOTAL_PAGES = 600


def _runs(*rows: tuple[int, int]) -> Runs:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _noise(pages: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(pages * PAGE_BYTES)


def _read(ram: GuestRam, runs: Runs) -> bytes:
    out = memoryview(bytearray(b"\xff" * (pages_in(runs) * PAGE_BYTES + 1)))
    size = ram.gather(runs, out)
    assert size == pages_in(runs) * PAGE_BYTES
    assert out[size] == 0xFF, "gather wrote past its pages"
    return bytes(out[:size])


class GuestRamContract:
    """Inherit, and give a fixture `ram`: TOTAL_PAGES pages that were never written."""

    def test_new_ram_is_zero_and_has_its_size(self, ram: GuestRam) -> None:
        assert ram.total_pages == TOTAL_PAGES
        assert len(ram.populated_runs()) == 0
        assert not any(_read(ram, _runs((0, TOTAL_PAGES))))

    @pytest.mark.parametrize(
        "rows",
        [
            [(0, 1)],
            [(TOTAL_PAGES - 1, 1)],
            [(0, TOTAL_PAGES)],
            [(3, 1), (4, 1), (9, 2)],
            [(0, 100), (200, 1), (300, 256)],
            [(gfn, 1) for gfn in range(1, TOTAL_PAGES, 2)],
        ],
    )
    def test_what_was_scattered_is_gathered(self, ram: GuestRam, rows: list[tuple[int, int]]) -> None:
        runs = _runs(*rows)
        for seed in (1, 2):  # the second time over pages that are there
            pages = _noise(pages_in(runs), seed)
            ram.scatter(runs, memoryview(pages))
            assert _read(ram, runs) == pages
        whole = np.frombuffer(_read(ram, _runs((0, TOTAL_PAGES))), dtype=np.uint8).reshape(-1, PAGE_BYTES)
        expected = np.zeros_like(whole)
        expected[expand(runs)] = np.frombuffer(pages, dtype=np.uint8).reshape(-1, PAGE_BYTES)
        assert (whole == expected).all()

    def test_every_page_that_was_written_is_populated(self, ram: GuestRam) -> None:
        runs = _runs((0, 1), (5, 3), (TOTAL_PAGES - 1, 1))
        ram.scatter(runs, memoryview(_noise(5)))
        populated = ram.populated_runs()
        assert pages_in(intersect(populated, runs)) == 5
        assert int(populated[-1].sum()) <= TOTAL_PAGES

    def test_present_and_missing_pages_are_gathered_together(self, ram: GuestRam) -> None:
        pages = _noise(8)
        ram.scatter(_runs((10, 4), (20, 4)), memoryview(pages))
        ram.populated_runs()
        got = _read(ram, _runs((9, 1), (10, 4), (14, 2), (20, 4), (24, 1)))
        zero = bytes(PAGE_BYTES)
        half = 4 * PAGE_BYTES
        assert got == zero + pages[:half] + zero * 2 + pages[half:] + zero

    def test_scattered_zeros_are_holes_again(self, ram: GuestRam) -> None:
        ram.scatter(_runs((0, TOTAL_PAGES)), memoryview(_noise(TOTAL_PAGES)))
        ram.populated_runs()
        ram.scatter_zeros(_runs((1, 1), (100, 300), (TOTAL_PAGES - 1, 1)))
        assert not any(_read(ram, _runs((1, 1), (100, 300), (TOTAL_PAGES - 1, 1))))
        assert pages_in(ram.populated_runs()) == TOTAL_PAGES - 302
        ram.scatter(_runs((1, 1), (150, 1)), memoryview(_noise(2, seed=3)))
        assert _read(ram, _runs((1, 1), (150, 1))) == _noise(2, seed=3)

    def test_zeros_where_nothing_is_are_no_work_and_no_error(self, ram: GuestRam) -> None:
        ram.scatter_zeros(_runs((0, TOTAL_PAGES)))
        assert len(ram.populated_runs()) == 0

    def test_no_runs_are_no_pages(self, ram: GuestRam) -> None:
        assert ram.gather(_runs(), memoryview(bytearray())) == 0
        ram.scatter(_runs(), memoryview(b""))
        ram.scatter_zeros(_runs())

    def test_closing_twice_is_allowed(self, ram: GuestRam) -> None:
        ram.close()
        ram.close()
