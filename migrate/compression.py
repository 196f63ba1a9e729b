"""Whether pages are worth compressing, and those that were sent before worth a delta, found out by trying it.

Law: pure; it is told bytes and times. What counts is guest RAM moved per second from end to end, whatever holds
it back: the link, this host's cores or the other's. No model of those is as good as a short trial: compression
doubles what a slow link carries and cuts what two busy hosts do on a fast one by half (one core compresses about
0.4 GB/s with zstd level 1, and a core of the destination that writes fresh RAM takes in 1.5 GB/s).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["ARM_BYTES", "Compression", "CompressionChooser", "DeltaChooser", "arm_bytes", "deltas_pay"]

ZSTD_LEVEL: Final = 1  # level 3 costs half the speed for 5 % of the bytes on guest RAM
# Page bytes of one trial that the peer has acknowledged, 24 ms on a fast link; and on a slow one, where so many would
# take a second and half of them be sent for nothing, the bytes of a few batches and a time that no wake-up matters in.
ARM_BYTES: Final = 16 << 20
LEAST_ARM_BYTES: Final = 4 << 20
ARM_S: Final = 0.02
# An arm that is so much slower than the other way by then is not carried on: on a fast link each of its bytes costs two
# hosts CPU.
HOPELESS: Final = 1.5
# Bytes of pages that go the better way between two trials; doubled each time it proves to be the better one again.
# Raw is believed for less at first: a stall of 0.1 s while zstd is tried makes raw look better on a link that it fills.
# And zstd for one arm, until raw was tried again: the first arm of all, which goes raw, is slower than those after it.
# One move of six over a fast link went as zstd as a whole, and took half as long again (2 vCPUs, 264 MiB).
FIRST_STRETCH_BYTES: Final = 512 << 20
FIRST_RAW_STRETCH_BYTES: Final = 128 << 20
LONGEST_STRETCH_BYTES: Final = 16 << 30
# What two hosts do at the least with deltas of pages that were written sparsely. Where pages move faster without,
# deltas slow them down: 64 MiB take a round of 70 to 150 ms as deltas and one of 60 raw (2 vCPUs, loopback).
DELTAS_PAY_BELOW_BYTES_PER_S: Final = 400e6
# How much of what the better way moves a second is the last arm's: one may take three times as long as the next.
ARM_SMOOTHING: Final = 0.3
# The choice changes only for a clear gain: the rates are noisy.
CLEAR_GAIN: Final = 1.1
# Batches that go without a delta after one was tried for nothing, doubled each time: a guest that writes whole pages
# anew pays for 2 % of its batches twice.
LONGEST_WITHOUT_DELTA: Final = 64


def arm_bytes(bytes_per_s: float, other_bytes_per_s: float = 0.0) -> float:
    """Give how many bytes of pages a trial has that moves so many a second, where the other way has moved so many."""
    if bytes_per_s * HOPELESS < other_bytes_per_s:
        return LEAST_ARM_BYTES
    return min(max(LEAST_ARM_BYTES, ARM_S * bytes_per_s), ARM_BYTES)


class Compression(StrEnum):
    """What the configuration says."""

    AUTO = "auto"
    OFF = "off"
    ZSTD = "zstd"


def deltas_pay(compression: Compression, is_zstd_better: bool, bytes_per_s: float) -> bool:
    """Judge whether pages are worth a delta, where the better way moves so many bytes of them a second.

    Raw may be the better way of two where a delta is better than both: on hosts that compress no faster than the link
    carries a delta takes a quarter of zstd's CPU and a hundredth of the bytes.
    """
    if compression is Compression.AUTO:
        return is_zstd_better or bytes_per_s < DELTAS_PAY_BELOW_BYTES_PER_S
    return compression is Compression.ZSTD


@dataclass(slots=True, kw_only=True)
class _Arm:
    """What goes one way. `given` is all that was given before it; `seen_acked` its bytes where its time begins."""

    given: int
    page_bytes: int = 0
    payload_bytes: int = 0
    seen_acked: int | None = None
    took_s: float = 0.0


class CompressionChooser:
    """Chooses raw or zstd for each batch. Safe to call from several worker threads.

    Sending is cut into arms of `arm_bytes` of pages. The first goes raw, the second zstd, then the better way
    for a stretch, then one arm the other way again, and so on. Time between rounds does not count.

    An arm's speed is that of its own acknowledged bytes, from the first of them on: what is given only fills the
    window at first, as fast as memory is copied, and then waits for the bytes of the arm before it.

    Args:
        acked: bytes of payload that the peer has, of all that were given; from any thread.
    """

    def __init__(self, compression: Compression, acked: Callable[[], int]) -> None:
        self._compression = compression
        self._acked = acked
        self._lock = threading.Lock()
        self._is_zstd = compression is Compression.ZSTD
        self._better_is_zstd = False
        self._rates: dict[bool, float] = {}
        self._better_bytes_per_s = 0.0
        self._given = 0
        self._arm = _Arm(given=0)
        self._seen_s: float | None = None
        self._stretch_bytes = 0
        self._left_bytes = 0

    def level(self) -> int | None:
        """Give the zstd level for the next batch, or None for raw."""
        return ZSTD_LEVEL if self._is_zstd else None

    @property
    def deltas_pay(self) -> bool:
        """Whether pages are worth a delta, as `deltas_pay` judges; they are as long as nobody knows."""
        is_better_or_unknown = self._better_is_zstd or len(self._rates) < 2
        return deltas_pay(self._compression, is_better_or_unknown, self._better_bytes_per_s)

    def began(self, now_s: float) -> None:
        """A round begins: time counts from here."""
        with self._lock:
            self._seen_s = now_s

    def ended(self, now_s: float) -> None:
        """A round has ended, everything in it is acknowledged."""
        with self._lock:
            self._pass_time(now_s)
            self._seen_s = None

    def gave(self, page_bytes: int, payload_bytes: int, now_s: float) -> None:
        """A worker has made a payload with so many bytes of pages that are not zero."""
        if self._compression is not Compression.AUTO:
            return
        with self._lock:
            self._pass_time(now_s)
            arm = self._arm
            self._given += payload_bytes
            arm.page_bytes += page_bytes
            arm.payload_bytes += payload_bytes
            acked = self._acked() - arm.given
            if acked <= 0 or arm.seen_acked is None:
                # Bytes of the arm before are still under way, or the first of this one have just arrived.
                arm.seen_acked = acked if acked > 0 else None
                arm.took_s = 0.0
                return
            moved = (acked - arm.seen_acked) * arm.page_bytes / arm.payload_bytes
            if arm.took_s <= 0:
                return
            bytes_per_s, other = moved / arm.took_s, self._rates.get(not self._is_zstd, 0.0)
            if moved >= arm_bytes(bytes_per_s, other):
                self._end_arm(bytes_per_s)
                self._arm = _Arm(given=self._given)

    def passed(self, payload_bytes: int) -> None:
        """A worker has made a payload of deltas: it says nothing about the two ways; an arm begins anew after it."""
        with self._lock:
            self._given += payload_bytes
            self._arm = _Arm(given=self._given)

    def _pass_time(self, now_s: float) -> None:
        if self._seen_s is not None and now_s > self._seen_s:
            self._arm.took_s += now_s - self._seen_s
            self._seen_s = now_s

    def _end_arm(self, bytes_per_s: float) -> None:
        """Keep the arm's rate, and decide how the next one goes."""
        self._rates[self._is_zstd] = bytes_per_s
        self._left_bytes -= self._arm.page_bytes
        if len(self._rates) < 2:
            self._better_bytes_per_s = bytes_per_s
            self._is_zstd = not self._is_zstd
        elif self._is_zstd is not self._better_is_zstd:
            self._judge()
        else:
            self._better_bytes_per_s += ARM_SMOOTHING * (bytes_per_s - self._better_bytes_per_s)
            if self._left_bytes <= 0:
                self._is_zstd = not self._better_is_zstd

    def _judge(self) -> None:
        """Both rates are fresh: use the better way for a stretch."""
        better, other = self._rates[self._better_is_zstd], self._rates[not self._better_is_zstd]
        if other > better * CLEAR_GAIN:
            self._better_is_zstd = not self._better_is_zstd
            self._better_bytes_per_s = other
            self._stretch_bytes = 0
        if not self._better_is_zstd:
            least_bytes = FIRST_RAW_STRETCH_BYTES
        else:
            least_bytes = FIRST_STRETCH_BYTES if self._stretch_bytes else ARM_BYTES
        self._stretch_bytes = min(max(2 * self._stretch_bytes, least_bytes), LONGEST_STRETCH_BYTES)
        self._left_bytes = self._stretch_bytes
        self._is_zstd = self._better_is_zstd


class DeltaChooser:
    """Chooses whether a batch whose pages have a base is tried as a delta. Safe to call from several worker threads.

    A delta is worth its while nearly always: sparse writes cost a tenth of the CPU of plain zstd and a hundredth of the
    bytes. Where pages are written as a whole it is work for nothing, and then it is tried now and then only.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stretch = 0
        self._left = 0

    def tries(self) -> bool:
        """Ask before each batch."""
        with self._lock:
            self._left -= 1
            return self._left < 0

    def tried(self, *, is_worth: bool) -> None:
        """A batch was tried: whether it went as a delta."""
        with self._lock:
            self._stretch = 0 if is_worth else min(max(2 * self._stretch, 1), LONGEST_WITHOUT_DELTA)
            self._left = self._stretch
