from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.digest import (
    DIGEST_BYTES,
    GROUP_PAGES,
    HASH_BYTES,
    MIN_KEY_BYTES,
    RamDigest,
    page_views,
    total_of,
)
from memory.layout import PAGE_BYTES
from memory.runs import expand
from tests.fakes.ram import BytesRam
from tests.memory.strategies import TOTAL_PAGES, page, run

KEY = bytes(range(MIN_KEY_BYTES))

writes = st.lists(st.tuples(st.integers(0, TOTAL_PAGES - 1), st.sampled_from([0, 1, 2, 128])), max_size=12)


@given(writes)
@settings(deadline=None, max_examples=25)
def test_page_by_page_gives_the_total_of_a_full_scan(writes: list[tuple[int, int]]) -> None:
    ram, digest = BytesRam(TOTAL_PAGES), RamDigest(TOTAL_PAGES, KEY)
    for gfn, fill in writes:
        ram.write(gfn, page(fill))
        if fill:
            digest.update(run((gfn, 1)), page_views(memoryview(page(fill))))
        else:
            digest.update_zeros(run((gfn, 1)))
    assert digest.total() == total_of(ram, KEY)
    assert len(digest.total()) == DIGEST_BYTES


def test_a_new_digest_is_of_zeros_however_they_are_told() -> None:
    fresh, hashed = RamDigest(300, KEY), RamDigest(300, KEY)
    hashed.update(run((0, 300)), page_views(memoryview(bytes(300 * PAGE_BYTES))))
    assert fresh.total() == hashed.total() == total_of(BytesRam(300), KEY)


@pytest.mark.parametrize("bit", [0, 7, 63, 64, PAGE_BYTES * 8 - 1])
def test_one_flipped_bit_changes_the_total(bit: int) -> None:
    octets = bytearray(page(128))
    digest, other = RamDigest(4, KEY), RamDigest(4, KEY)
    digest.update(run((2, 1)), page_views(memoryview(octets)))
    octets[bit // 8] ^= 1 << bit % 8
    other.update(run((2, 1)), page_views(memoryview(octets)))
    assert digest.total() != other.total()
    assert digest.differing_pages(other.page_hashes).tolist() == [2]


def test_top_bits_do_not_cancel_out() -> None:
    octets = np.frombuffer(page(128), dtype=np.uint64).copy()
    digest, other = RamDigest(1, KEY), RamDigest(1, KEY)
    digest.update(run((0, 1)), page_views(octets.data))
    octets[3:5] ^= np.uint64(1 << 63)
    other.update(run((0, 1)), page_views(octets.data))
    assert digest.total() != other.total()


def test_pages_that_changed_places_change_the_total() -> None:
    digest, swapped = RamDigest(8, KEY), RamDigest(8, KEY)
    digest.update(run((1, 1), (5, 1)), page_views(memoryview(page(1) + page(2))))
    swapped.update(run((1, 1), (5, 1)), page_views(memoryview(page(2) + page(1))))
    assert digest.total() != swapped.total()
    assert digest.differing_pages(swapped.page_hashes).tolist() == [1, 5]


def test_the_key_and_the_number_of_pages_are_part_of_the_total() -> None:
    totals = [RamDigest(8, KEY).total(), RamDigest(9, KEY).total(), RamDigest(8, KEY[::-1]).total()]
    assert len(set(totals)) == 3


def test_the_total_is_the_same_in_every_version() -> None:
    digest = RamDigest(3, KEY)
    digest.update(run((1, 1)), page_views(memoryview(page(1))))
    assert digest.total().hex() == "10855ac4c966fe6957134710176a2d9e"


@given(writes, writes, st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_comparing_by_groups_finds_the_pages_that_differ(
    here: list[tuple[int, int]], there: list[tuple[int, int]], at_once: int
) -> None:
    digests = []
    for writes in (here, there):
        ram, digest = BytesRam(TOTAL_PAGES), RamDigest(TOTAL_PAGES, KEY)
        for gfn, fill in writes:
            ram.write(gfn, page(fill))
        digest.scan(ram, ram.populated_runs())
        digests.append(digest)
    ours, theirs = digests
    found: list[int] = []
    for first in range(0, ours.groups, at_once):
        count = min(at_once, ours.groups - first)
        mine, other = ours.group_digests(first, count), theirs.group_digests(first, count)
        groups = [
            first + at
            for at in range(count)
            if mine[at * DIGEST_BYTES :][:DIGEST_BYTES] != other[at * DIGEST_BYTES :][:DIGEST_BYTES]
        ]
        found += expand(ours.differing_in_groups(groups, theirs.hashes_of_groups(groups))).tolist()
    assert found == ours.differing_pages(theirs.page_hashes).tolist()


@pytest.mark.parametrize("pages", [1, GROUP_PAGES - 1, GROUP_PAGES, GROUP_PAGES + 1])
def test_the_last_group_may_be_smaller(pages: int) -> None:
    digest, other = RamDigest(pages, KEY), RamDigest(pages, KEY)
    other.update(run((pages - 1, 1)), page_views(memoryview(page(1))))
    last = digest.groups - 1
    assert digest.group_digests(last, 1) != other.group_digests(last, 1)
    assert len(digest.hashes_of_groups([last])) == (pages - last * GROUP_PAGES) * HASH_BYTES
    assert expand(digest.differing_in_groups([last], other.hashes_of_groups([last]))).tolist() == [pages - 1]


@pytest.mark.parametrize("groups", [(-1,), (2,), (0, 0), (0, 1, 1)])
def test_groups_that_are_not_there_do_not_compare(groups: tuple[int, ...]) -> None:
    digest = RamDigest(GROUP_PAGES + 1, KEY)
    with pytest.raises(ValueError, match=r"groups 0 to 1|are not the hashes|in order, each once"):
        digest.differing_in_groups(groups, bytes(HASH_BYTES))


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes"):
        RamDigest(1, KEY[1:])
    digest = RamDigest(2, KEY)
    with pytest.raises(ValueError, match="no whole pages"):
        page_views(memoryview(bytes(PAGE_BYTES - 1)))
    with pytest.raises(ValueError, match="not 1 pages"):
        digest.update(run((0, 1)), page_views(memoryview(bytes(2 * PAGE_BYTES))))
    with pytest.raises(ValueError, match="do not compare"):
        digest.differing_pages(RamDigest(3, KEY).page_hashes)
    with pytest.raises(ValueError, match="read-only"):
        digest.page_hashes[0] = 1
