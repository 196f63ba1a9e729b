from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from memory.blocks import BlockRam
from memory.layout import PAGE_BYTES, Layout
from memory.ram import MappedRam, create_ram_file
from memory.runs import Runs, expand, runs_of_gfns
from tests.contracts.guest_ram import TOTAL_PAGES, GuestRamContract


def block(pages: int) -> MappedRam:
    layout = Layout.of_sizes([("block", pages * PAGE_BYTES)])
    fd = create_ram_file(layout, "block")
    try:
        return MappedRam(fd, layout)
    finally:
        os.close(fd)


@pytest.fixture(params=[(TOTAL_PAGES,), (100, 1, TOTAL_PAGES - 101)], ids=["one block", "three blocks"])
def ram(request: pytest.FixtureRequest) -> Iterator[BlockRam]:
    blocks = BlockRam([block(pages) for pages in request.param])
    yield blocks
    blocks.close()


class TestBlocks(GuestRamContract):
    """All that a RAM of one file does."""


def _runs(*rows: tuple[int, int]) -> Runs:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def test_holes_are_found_among_the_pages_that_are_asked_for(ram: BlockRam) -> None:
    ram.scatter(_runs((90, 30)), memoryview(b"x" * (30 * PAGE_BYTES)))
    ram.scatter_zeros(_runs((95, 3), (99, 3)))
    found = ram.holes_among(_runs((80, 12), (94, 3), (99, 10)))
    assert expand(found).tolist() == [*range(80, 90), 95, 96, 99, 100, 101]


def test_a_page_that_became_a_hole_is_not_made_again_by_reading_it(ram: BlockRam) -> None:
    ram.scatter(_runs((0, 200)), memoryview(b"x" * (200 * PAGE_BYTES)))
    ram.populated_runs()
    scattered = runs_of_gfns(np.arange(0, 200, 7, dtype=np.int64))
    ram.scatter_zeros(scattered)
    assert expand(ram.holes_among(_runs((0, 200)))).tolist() == expand(scattered).tolist()
    out = memoryview(bytearray(b"y" * (200 * PAGE_BYTES)))
    ram.gather(_runs((0, 200)), out)
    assert expand(ram.holes_among(_runs((0, 200)))).tolist() == expand(scattered).tolist()


def test_runs_past_the_end_are_a_bug_of_ours(ram: BlockRam) -> None:
    with pytest.raises(ValueError, match="leave"):
        ram.gather(_runs((TOTAL_PAGES - 1, 2)), memoryview(bytearray(2 * PAGE_BYTES)))
    with pytest.raises(ValueError, match="are not"):
        ram.scatter(_runs((0, 2)), memoryview(bytes(PAGE_BYTES)))
