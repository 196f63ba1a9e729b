from __future__ import annotations

import itertools

import pytest

from migrate.compression import (
    ARM_BYTES,
    FIRST_STRETCH_BYTES,
    LONGEST_WITHOUT_DELTA,
    ZSTD_LEVEL,
    Compression,
    CompressionChooser,
    DeltaChooser,
)

BATCH_BYTES = 1 << 20
MEMORY_PER_S = 4e9


class Link:
    """A link with a window: what is given fills it at once, and is acknowledged as fast as the link carries it."""

    def __init__(
        self, wire_per_s: float, zstd_per_s: float, *, ratio: float = 2.2, window: int = 4 << 20
    ) -> None:
        self.chooser = CompressionChooser(Compression.AUTO, self.acked)
        self.wire_per_s = wire_per_s
        self.zstd_per_s = zstd_per_s
        self.ratio = ratio
        self.window = window
        self.now_s = 0.0
        self.given = 0
        # The sender sleeps: before which batch of all, and how long.
        self.stall: tuple[int, float] = (-1, 0.0)
        # So many batches at the beginning of each round go at a third of the speed.
        self.cold_batches = 0
        # (when it is acknowledged, how many bytes of payload)
        self.under_way: list[tuple[float, int]] = []

    def acked(self) -> int:
        self.under_way = [one for one in self.under_way if one[0] > self.now_s]
        return self.given - sum(size for _, size in self.under_way)

    def send(self, arms: float) -> list[bool]:
        """Send a round of so many arms; give, for each batch, whether it went compressed."""
        sent = []
        self.chooser.began(self.now_s)
        for number in range(int(arms * ARM_BYTES // BATCH_BYTES)):
            self.now_s += self.stall[1] if number == self.stall[0] else 0.0
            while self.given - self.acked() >= self.window:
                self.now_s = self.under_way[0][0]
            is_zstd = self.chooser.level() == ZSTD_LEVEL
            self.now_s += BATCH_BYTES / (self.zstd_per_s if is_zstd else MEMORY_PER_S)
            size = int(BATCH_BYTES / self.ratio) if is_zstd else BATCH_BYTES
            begins_s = max(self.under_way[-1][0], self.now_s) if self.under_way else self.now_s
            slowness = 3 if number < self.cold_batches else 1
            self.under_way.append((begins_s + slowness * size / self.wire_per_s, size))
            self.given += size
            self.chooser.gave(BATCH_BYTES, size, self.now_s)
            sent.append(is_zstd)
        if self.under_way:
            self.now_s = max(self.now_s, self.under_way[-1][0])
        self.chooser.ended(self.now_s)
        return sent


FAST, SLOW = (2e9, 0.5e9), (50e6, 1e9)
ARM = ARM_BYTES // BATCH_BYTES
FIRST_STRETCH_ARMS = FIRST_STRETCH_BYTES // ARM_BYTES


@pytest.mark.parametrize(("compression", "all_zstd"), [(Compression.OFF, False), (Compression.ZSTD, True)])
def test_the_configuration_has_the_last_word(compression: Compression, all_zstd: bool) -> None:
    link = Link(*(SLOW if compression is Compression.OFF else FAST))
    link.chooser = CompressionChooser(compression, link.acked)
    assert set(link.send(100)) == {all_zstd}


def test_both_ways_are_tried_and_a_fast_link_goes_on_raw() -> None:
    sent = Link(*FAST).send(FIRST_STRETCH_ARMS)
    assert any(sent[: 4 * ARM])
    # What comes after are two more trials, of a few batches.
    assert sent[4 * ARM :].count(True) <= 12


def test_a_slow_link_goes_on_compressed() -> None:
    sent = Link(*SLOW).send(FIRST_STRETCH_ARMS)
    assert not any(sent[:4])
    # What was sent raw to find out, and to be sure: the window and a short arm each, a fifth of a second.
    assert all(sent[10:30])
    assert sent[30:].count(False) <= 10
    assert all(sent[4 * ARM :])


@pytest.mark.parametrize("window", [4 << 20, 16 << 20, 64 << 20])
@pytest.mark.parametrize("round_arms", [1.3, 4, 7])
def test_bytes_that_only_filled_the_window_are_no_speed(window: int, round_arms: float) -> None:
    # 1 Gbit/s. What fills the window is taken at once: raw pages seemed as fast as memory, and the zstd pages after
    # them as slow as the raw ones that they waited for.
    link = Link(118e6, 0.4e9, window=window)
    for _ in range(int(24 / round_arms) + 1):
        sent = link.send(round_arms)
    assert all(sent)


def test_no_clear_gain_is_no_reason_to_compress() -> None:
    sent = Link(100e6, 1e9, ratio=1.05).send(FIRST_STRETCH_ARMS)
    assert sent[4 * ARM :].count(True) <= 20


def test_trials_become_rarer_while_they_bring_nothing() -> None:
    sent = Link(*FAST).send(1000)
    trials = [at for at in range(1, len(sent)) if sent[at] and not sent[at - 1]]
    assert 3 <= len(trials) <= 8
    stretches = [after - before for before, after in itertools.pairwise(trials)]
    assert all(after >= 1.8 * before for before, after in itertools.pairwise(stretches))


def test_a_trial_that_is_hopeless_is_a_short_one() -> None:
    """64 MiB, as much as a small guest has: of two whole trials half of them would be the slow one."""
    assert Link(*FAST).send(4).count(True) <= 8
    assert Link(2e9, 1.5e9).send(4).count(True) >= ARM


def test_a_link_that_became_slow_is_noticed_at_the_next_trial() -> None:
    link = Link(*FAST)
    link.send(10)
    link.wire_per_s, link.zstd_per_s = SLOW
    sent = link.send(200)
    assert sent[-50 * ARM :].count(True) >= 48 * ARM


def test_a_stall_in_the_first_trial_is_not_believed_for_long() -> None:
    """1 Gbit/s, and the sender sleeps while zstd is tried: a guest of 256 MiB would go raw as a whole."""
    fooled = 0
    for batch in range(32):
        link = Link(118e6, 1e9)
        link.stall = (batch, 0.1)
        sent = link.send(20)
        fooled += not all(sent[32:64])
        assert all(sent[-64:]), batch
    assert fooled, "no stall made it choose raw: this shows nothing"


@pytest.mark.parametrize("cold_batches", [4, 8, 12, 16])
def test_a_slow_start_in_the_first_trial_is_not_believed_for_long(cold_batches: int) -> None:
    """Threads that have just begun, and new buffers, while raw is tried: 256 MiB went as zstd, in twice the time."""
    link = Link(0.3e9, 0.2e9)
    link.cold_batches = cold_batches
    sent = link.send(16)
    assert sent.count(True) <= 64
    assert not any(sent[-64:-16])


@pytest.mark.parametrize(
    ("link", "are_worth_it"),
    [
        # Hosts that compress no faster than 1 Gbit/s carries: raw is the better way, deltas are better than both.
        (Link(118e6, 0.09e9), True),
        (Link(*SLOW), True),
        (Link(*FAST), False),
    ],
)
def test_deltas_are_worth_it_where_pages_move_slowly(link: Link, are_worth_it: bool) -> None:
    assert link.chooser.deltas_pay
    is_zstd = link.send(4)[-1]
    assert link.chooser.deltas_pay is are_worth_it
    assert is_zstd is (link.wire_per_s == SLOW[0])


def test_one_slow_arm_is_no_reason_for_deltas() -> None:
    link = Link(*FAST)
    for number in range(40):
        # Every fourth arm or so a stall of 50 ms: 16 MiB at 2 GB/s take 8.
        link.stall = (5, 0.05 if number % 4 == 3 else 0.0)
        link.send(1)
        assert number < 4 or not link.chooser.deltas_pay


@pytest.mark.parametrize(("compression", "saves"), [(Compression.OFF, False), (Compression.ZSTD, True)])
def test_the_configuration_has_the_last_word_of_deltas_too(compression: Compression, saves: bool) -> None:
    assert CompressionChooser(compression, lambda: 0).deltas_pay is saves


def test_time_between_rounds_does_not_count() -> None:
    link = Link(*SLOW)
    for _ in range(10):
        link.send(1)
        link.now_s += 100.0
    assert all(link.send(10))


def test_a_clock_that_stands_still_teaches_nothing() -> None:
    chooser = CompressionChooser(Compression.AUTO, lambda: 10 * ARM_BYTES)
    chooser.began(1.0)
    chooser.gave(ARM_BYTES, ARM_BYTES, 1.0)
    chooser.gave(ARM_BYTES, ARM_BYTES, 0.5)
    assert chooser.level() is None


@pytest.mark.parametrize(("speeds", "is_zstd"), [(SLOW, True), (FAST, False)])
def test_deltas_in_between_say_nothing_about_the_two_ways(speeds: tuple[float, float], is_zstd: bool) -> None:
    link = Link(*speeds)
    sent: list[bool] = []
    for _ in range(20):
        sent = link.send(4)
        # Bytes for which no page was counted: they would make the way that is on look slow, or quick.
        for _ in range(64):
            link.chooser.passed(1 << 20)
            link.given += 1 << 20
    assert sent.count(is_zstd) > 0.9 * len(sent)


def test_deltas_are_tried_as_long_as_they_are_worth_it() -> None:
    chooser = DeltaChooser()
    for _ in range(100):
        assert chooser.tries()
        chooser.tried(is_worth=True)


def test_deltas_for_nothing_become_rare_and_one_that_is_worth_it_brings_them_back() -> None:
    chooser, tried = DeltaChooser(), 0
    for _ in range(50 * LONGEST_WITHOUT_DELTA):
        if chooser.tries():
            tried += 1
            chooser.tried(is_worth=False)
    assert 40 < tried < 65
    while not chooser.tries():
        pass
    chooser.tried(is_worth=True)
    assert chooser.tries()
