"""How many pages a payload has: by what the link has carried just now."""

from __future__ import annotations

from migrate.batching import FAST_BYTES_PER_S, LARGE_BATCH_PAGES, LOOK_EVERY_S, SMALL_BATCH_PAGES, BatchSize


class Link:
    """A link that carries at a rate, and the clock of it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.acked = 0.0
        self.size = BatchSize(lambda: int(self.acked))

    def carry(self, bytes_per_s: float, for_s: float, steps: int = 10) -> list[int]:
        """Give the sizes of batches that were asked for meanwhile."""
        sizes = []
        for _ in range(steps):
            self.now_s += for_s / steps
            self.acked += bytes_per_s * for_s / steps
            sizes.append(self.size.pages(self.now_s))
        return sizes


def test_a_fast_link_has_large_batches_once_it_has_shown_that_it_is_fast() -> None:
    link = Link()
    assert link.size.pages(link.now_s) == SMALL_BATCH_PAGES
    sizes = link.carry(4 * FAST_BYTES_PER_S, 2 * LOOK_EVERY_S)
    assert sizes[0] == SMALL_BATCH_PAGES
    assert sizes[-1] == LARGE_BATCH_PAGES


def test_a_slow_link_never_has_large_ones() -> None:
    link = Link()
    assert set(link.carry(0.9 * FAST_BYTES_PER_S, 100 * LOOK_EVERY_S, steps=1000)) == {SMALL_BATCH_PAGES}


def test_a_link_that_becomes_slow_or_breaks_has_small_ones_again() -> None:
    link = Link()
    link.carry(4 * FAST_BYTES_PER_S, 2 * LOOK_EVERY_S)
    assert link.carry(0, 2 * LOOK_EVERY_S)[-1] == SMALL_BATCH_PAGES


def test_a_round_begins_with_small_ones_after_a_time_without_pages() -> None:
    link = Link()
    link.carry(4 * FAST_BYTES_PER_S, 2 * LOOK_EVERY_S)
    link.now_s += 1.0
    assert link.size.pages(link.now_s) == SMALL_BATCH_PAGES


def test_a_window_that_fills_in_a_moment_is_no_proof() -> None:
    link = Link()
    link.acked += 100 << 20
    assert link.carry(0, LOOK_EVERY_S / 2)[-1] == SMALL_BATCH_PAGES
