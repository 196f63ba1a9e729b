from __future__ import annotations

from migrate.compression import (
    ARM_BYTES,
    FIRST_STRETCH_ARMS,
    ZSTD_LEVEL,
    Compression,
    CompressionChooser,
)


class Link:
    """Sends arms over a link that carries so much raw and so much compressed, and notes how each went."""

    def __init__(self, chooser: CompressionChooser, raw_per_s: float, zstd_per_s: float) -> None:
        self.chooser = chooser
        self.raw_per_s = raw_per_s
        self.zstd_per_s = zstd_per_s
        self.now_s = 0.0
        self.arms: list[bool] = []

    def send(self, arms: int) -> list[bool]:
        """Give, for each arm, whether it went compressed."""
        sent = []
        self.chooser.began(self.now_s)
        for _ in range(arms):
            is_zstd = self.chooser.level() == ZSTD_LEVEL
            self.now_s += ARM_BYTES / (self.zstd_per_s if is_zstd else self.raw_per_s)
            self.chooser.gave(ARM_BYTES, self.now_s)
            sent.append(is_zstd)
        self.chooser.ended(self.now_s)
        return sent


def test_the_configuration_has_the_last_word() -> None:
    assert not any(Link(CompressionChooser(Compression.OFF), 1e6, 1e9).send(100))
    assert all(Link(CompressionChooser(Compression.ZSTD), 1e9, 1e6).send(100))


def test_both_ways_are_tried_and_a_fast_link_goes_on_raw() -> None:
    sent = Link(CompressionChooser(Compression.AUTO), 2e9, 0.5e9).send(FIRST_STRETCH_ARMS)
    assert sent[:2] == [False, True]
    assert not any(sent[2:])


def test_a_slow_link_goes_on_compressed() -> None:
    sent = Link(CompressionChooser(Compression.AUTO), 50e6, 110e6).send(FIRST_STRETCH_ARMS)
    assert sent[0] is False
    assert all(sent[1:])


def test_no_clear_gain_is_no_reason_to_compress() -> None:
    sent = Link(CompressionChooser(Compression.AUTO), 100e6, 109e6).send(FIRST_STRETCH_ARMS)
    assert not any(sent[2:])


def test_trials_become_rarer_while_they_bring_nothing() -> None:
    sent = Link(CompressionChooser(Compression.AUTO), 2e9, 0.5e9).send(1000)
    assert 3 <= sent.count(True) <= 6


def test_a_link_that_became_slow_is_noticed_at_the_next_trial() -> None:
    link = Link(CompressionChooser(Compression.AUTO), 2e9, 0.5e9)
    link.send(10)
    link.raw_per_s, link.zstd_per_s = 50e6, 110e6
    sent = link.send(200)
    assert sent[-50:].count(True) >= 48


def test_time_between_rounds_does_not_count() -> None:
    chooser = CompressionChooser(Compression.AUTO)
    link = Link(chooser, 50e6, 110e6)
    for _ in range(10):
        link.send(1)
        link.now_s += 100.0
    assert all(link.send(10))


def test_a_clock_that_stands_still_teaches_nothing() -> None:
    chooser = CompressionChooser(Compression.AUTO)
    chooser.began(1.0)
    chooser.gave(ARM_BYTES, 1.0)
    chooser.gave(ARM_BYTES, 0.5)
    assert chooser.level() is None
