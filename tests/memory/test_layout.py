from __future__ import annotations

import pytest

from memory.errors import LayoutMismatch
from memory.layout import MAX_BLOCKS, MAX_NAME_BYTES, MAX_TOTAL_PAGES, PAGE_BYTES, Layout


def test_blocks_lie_one_after_another() -> None:
    layout = Layout.of_sizes([("low", 3 * PAGE_BYTES), ("high", PAGE_BYTES)])
    assert [(block.name, block.first_gfn, block.pages) for block in layout.blocks] == [
        ("low", 0, 3),
        ("high", 3, 1),
    ]
    assert layout.total_pages == 4
    assert layout.total_bytes == 4 * PAGE_BYTES


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [("a", 0)],
        [("a", -PAGE_BYTES)],
        [("a", PAGE_BYTES + 1)],
        [("a", PAGE_BYTES), ("a", PAGE_BYTES)],
        [("", PAGE_BYTES)],
        [("é" * (MAX_NAME_BYTES // 2 + 1), PAGE_BYTES)],
        [("a", (MAX_TOTAL_PAGES + 1) * PAGE_BYTES)],
        [("a", MAX_TOTAL_PAGES * PAGE_BYTES), ("b", PAGE_BYTES)],
        [(str(n), PAGE_BYTES) for n in range(MAX_BLOCKS + 1)],
    ],
)
def test_a_layout_that_cannot_be_is_refused(sizes: list[tuple[str, int]]) -> None:
    with pytest.raises(LayoutMismatch):
        Layout.of_sizes(sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        [("n" * MAX_NAME_BYTES, PAGE_BYTES)],
        [("a", MAX_TOTAL_PAGES * PAGE_BYTES)],
        [(str(n), PAGE_BYTES) for n in range(MAX_BLOCKS)],
        [("\ud800", PAGE_BYTES)],
    ],
)
def test_exactly_on_the_limit_is_allowed(sizes: list[tuple[str, int]]) -> None:
    assert len(Layout.of_sizes(sizes).fingerprint()) == 16


def test_the_fingerprint_depends_on_names_sizes_and_order_and_on_nothing_else() -> None:
    sizes = [("ab", PAGE_BYTES), ("c", 2 * PAGE_BYTES)]
    same = Layout.of_sizes(sizes).fingerprint()
    assert Layout.of_sizes(list(sizes)).fingerprint() == same
    others: list[list[tuple[str, int]]] = [
        [("c", 2 * PAGE_BYTES), ("ab", PAGE_BYTES)],
        [("a", PAGE_BYTES), ("bc", 2 * PAGE_BYTES)],
        [("ab", 2 * PAGE_BYTES), ("c", PAGE_BYTES)],
        [("ab", PAGE_BYTES)],
    ]
    assert same not in [Layout.of_sizes(other).fingerprint() for other in others]


def test_the_fingerprint_is_the_same_in_every_version() -> None:
    layout = Layout.of_sizes([("pc.ram", 1 << 30)])
    assert layout.fingerprint().hex() == "31ff50a00d61b7cf93245c1b06870368"
