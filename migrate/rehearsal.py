"""A move rehearsed: its rounds as the planner would have them, with numbers in place of a guest and a link.

Law: pure. Who decides is `migrate.plan.decide`, the same as in a move; what a round sends and what the guest writes
meanwhile is arithmetic on one `Circumstances`, in which nothing is uncertain any more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Final

from memory.codec import MIN_DELTA_GAIN
from memory.layout import PAGE_BYTES
from migrate.compression import ARM_BYTES, CLEAR_GAIN, Compression, arm_bytes, deltas_pay
from migrate.dirtying import Curve
from migrate.forecast import Conditions
from migrate.plan import (
    ASSUMED_FIXED_S,
    ASSUMED_GOODPUT_BYTES_PER_S,
    FIRST_LOOK_S,
    TELLING_PAGES,
    Next,
    OnTimeout,
    catches_up,
    decide,
    has_much_left,
    is_in_sight,
)
from migrate.stats import RoundStats
from transport.limits import MAX_RECORD_BYTES

__all__ = [
    "RAW_BYTES_PER_S",
    "ZSTD_BYTES_PER_S",
    "Circumstances",
    "Rehearsed",
    "cpu_of",
    "pages_cpu_s",
    "rehearse",
]

# What two hosts do with pages where no link holds them back (bench/README.md: 1 GiB at 0.9 to 1.1 GB/s raw; one core
# compresses 0.4 GB/s). A draw scales all three alike.
RAW_BYTES_PER_S: Final = 0.9e9
ZSTD_BYTES_PER_S: Final = 0.4e9
ZERO_BYTES_PER_S: Final = 4e9
# Sealing, framing and TCP's acknowledgements do not count; a record of 512 KiB has some 100 bytes of head and table.
WIRE_OVERHEAD: Final = 1.002
# Control messages are not in `wire_bytes`; the hellos and the device state are.
WIRE_FIXED_BYTES: Final = 8 << 10
# What an arm gives beyond its bytes, while the window fills: they are counted when they are acknowledged.
IN_FLIGHT_BYTES: Final = 4 << 20
# The harvest, the drain and the threads' awakening, once a round.
ROUND_FIXED_S: Final = 0.003
# The planner gives up after 12 rounds without a minimum; a move with more rounds than this is shown as it stands.
MAX_ROUNDS: Final = 120
# Deltas of pages that were written sparsely, on the same hosts: copies, XOR and a look of zstd at zeros. 64 MiB take
# rounds of 70 to 150 ms, and small rounds are slower.
DELTA_BYTES_PER_S: Final = 0.6e9
# Of the pages that are dirty after a first round in which the log was looked at, the part that was sent after the look
# that showed it, and so has a base (64 MiB at 200 MiB/s over 1 Gbit/s: 0.6 and more).
FIRST_BASE_SHARE: Final = 0.75
# CPU of the source's agent: for each byte that goes raw (copied, hashed, sealed, sent), for each that is compressed,
# for each that is found zero, and for each that the proof reads; and beside them for a move and for each second.
RAW_CPU_S_PER_BYTE: Final = 1.7e-9
ZSTD_CPU_S_PER_BYTE: Final = 2.7e-9
ZERO_CPU_S_PER_BYTE: Final = 0.15e-9
DELTA_CPU_S_PER_BYTE: Final = 0.7e-9
AUDIT_CPU_S_PER_BYTE: Final = 0.25e-9
MOVE_CPU_S: Final = 0.035
CPU_S_PER_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """Everything a move depends on, as it may be.

    `host_factor` scales what the two hosts do with pages; `path_bytes_per_s` is what the wire carries, and
    `cap_bytes_per_s` the configured cap, infinite where there is none.
    `zstd_share` is the size of compressed data over its own, `delta_share` that of what has changed in a page.
    `fixed_s` is what a stop takes beside its last round, and `last_s` what that takes beside its pages.
    `late_s` is the second preflight and the arming, which begin when a stop is in sight (`migrate.readiness`).
    """

    curve: Curve
    populated_pages: int
    data_share: float
    zstd_share: float
    delta_share: float
    host_factor: float
    path_bytes_per_s: float
    cap_bytes_per_s: float
    overhead_s: float
    fixed_s: float
    last_s: float
    late_s: float
    cpu_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """How it went. `because` is the planner's last word."""

    total_s: float
    downtime_s: float
    wire_bytes: float
    cpu_s: float
    converges: bool
    rounds: int
    because: str


def pages_cpu_s(raw_bytes: float, zstd_bytes: float, zero_bytes: float, delta_bytes: float) -> float:
    """Give the CPU of pages that went raw, compressed, were found zero, and went as deltas."""
    return (
        raw_bytes * RAW_CPU_S_PER_BYTE
        + zstd_bytes * ZSTD_CPU_S_PER_BYTE
        + zero_bytes * ZERO_CPU_S_PER_BYTE
        + delta_bytes * DELTA_CPU_S_PER_BYTE
    )


def cpu_of(conditions: Conditions, *, pages_cpu_s: float, populated_bytes: float, total_s: float) -> float:
    """Give the CPU of the source's agent for a whole move, on hosts whose `cpu_factor` is 1."""
    audit_s = populated_bytes * AUDIT_CPU_S_PER_BYTE if conditions.audit else 0.0
    return MOVE_CPU_S + CPU_S_PER_S * total_s + pages_cpu_s + audit_s


class _Sending:
    """What sending costs, with the choice between raw and compressed as `CompressionChooser` makes it.

    A cap is a bucket: what it has saved up while nothing was sent goes at the path's own speed. That is all of a last
    round, where a guest is quiet.
    """

    def __init__(self, given: Circumstances, compression: Compression) -> None:
        host, path = given.host_factor, max(given.path_bytes_per_s, 1.0) / WIRE_OVERHEAD
        link = min(path, max(given.cap_bytes_per_s, 1.0) / WIRE_OVERHEAD)
        # Data that zstd shrinks by less than a sixteenth goes as it is, after it was tried.
        self._zstd_share = given.zstd_share if given.zstd_share <= 15 / 16 else 1.0
        self._raw_bytes_per_s = min(RAW_BYTES_PER_S * host, path)
        self._zstd_bytes_per_s = min(ZSTD_BYTES_PER_S * host, path / max(self._zstd_share, 1e-3))
        self._zero_bytes_per_s = ZERO_BYTES_PER_S * host
        raw_per_s = min(self._raw_bytes_per_s, link)
        zstd_per_s = min(self._zstd_bytes_per_s, link / max(self._zstd_share, 1e-3))
        self._is_zstd_better = zstd_per_s > CLEAR_GAIN * raw_per_s
        self._delta_share = min(max(given.delta_share, 0.0), 1.0)
        self._delta_bytes_per_s = min(DELTA_BYTES_PER_S * host, path / max(self._delta_share, 1e-3))
        is_small = self._delta_share * MIN_DELTA_GAIN <= 1
        self._has_deltas = is_small and deltas_pay(
            compression, self._is_zstd_better, zstd_per_s if self._is_zstd_better else raw_per_s
        )
        self._cap_bytes_per_s = max(given.cap_bytes_per_s, 1.0)
        self._saved_bytes = float(MAX_RECORD_BYTES)
        self._compression = compression
        self._given_bytes = 0.0
        self.wire_bytes = float(WIRE_FIXED_BYTES)
        self.cpu_s = 0.0

    def send(self, data_bytes: float, zero_bytes: float, based_bytes: float = 0.0) -> float:
        """Send pages, of which `based_bytes` have a base of a delta; give the seconds."""
        delta = min(based_bytes, data_bytes) if self._has_deltas else 0.0
        raw, zstd = self._split(data_bytes - delta)
        wire_bytes = (raw + zstd * self._zstd_share + delta * self._delta_share) * WIRE_OVERHEAD
        self.wire_bytes += wire_bytes
        self.cpu_s += pages_cpu_s(raw, zstd, zero_bytes, delta)
        took_s = raw / self._raw_bytes_per_s + zstd / self._zstd_bytes_per_s + delta / self._delta_bytes_per_s
        took_s += zero_bytes / self._zero_bytes_per_s
        took_s = max(took_s, (wire_bytes - self._saved_bytes) / self._cap_bytes_per_s)
        self._saved_bytes -= wire_bytes
        self.rest(took_s)
        return took_s

    def rest(self, time_s: float) -> None:
        """Let time pass."""
        saved = self._saved_bytes + min(time_s * self._cap_bytes_per_s, 1e18)
        self._saved_bytes = min(saved, float(MAX_RECORD_BYTES))

    def _split(self, data_bytes: float) -> tuple[float, float]:
        """Give how much goes raw and how much compressed: an arm of each, then the better way.

        Compressed, if that is the better one, goes one arm until raw was tried once more.
        """
        if self._compression is Compression.OFF:
            return data_bytes, 0.0
        if self._compression is Compression.ZSTD:
            return 0.0, data_bytes
        at, self._given_bytes = self._given_bytes, self._given_bytes + data_bytes
        end = self._given_bytes
        raw_per_s, zstd_per_s = (
            min(one, self._cap_bytes_per_s) for one in (self._raw_bytes_per_s, self._zstd_bytes_per_s)
        )
        first = arm_bytes(raw_per_s) + IN_FLIGHT_BYTES
        second = first + arm_bytes(zstd_per_s, raw_per_s) + IN_FLIGHT_BYTES
        if not self._is_zstd_better:
            zstd = _overlap(at, end, first, second)
            return data_bytes - zstd, zstd
        again = second + ARM_BYTES
        raw = _overlap(at, end, 0.0, first)
        raw += _overlap(at, end, again, again + arm_bytes(raw_per_s, zstd_per_s) + IN_FLIGHT_BYTES)
        return raw, data_bytes - raw


def _overlap(begin: float, end: float, low: float, high: float) -> float:
    return max(min(end, high) - max(begin, low), 0.0)


def rehearse(conditions: Conditions, given: Circumstances) -> Rehearsed:
    """Go through the rounds of one move."""
    policy = conditions.policy
    sending = _Sending(given, conditions.compression)
    populated_bytes = given.populated_pages * PAGE_BYTES
    data_bytes = populated_bytes * given.data_share
    if policy.is_offline:
        copy_s = sending.send(data_bytes, populated_bytes - data_bytes)
        return _ended(conditions, given, sending, 0.0, given.fixed_s + copy_s, True, 1, "offline")
    pages, zeros = data_bytes / PAGE_BYTES, (populated_bytes - data_bytes) / PAGE_BYTES
    rounds: list[RoundStats] = []
    passed_s, converges, because = 0.0, False, ""
    base_share = 0.0
    near_at_s: float | None = None

    def based_of(sent: float) -> float:
        return min(sent * PAGE_BYTES * base_share, float(conditions.delta_cache_bytes))

    is_out_of_time = False
    while len(rounds) < MAX_ROUNDS:
        sent = pages + zeros
        send_s = sending.send(pages * PAGE_BYTES, zeros * PAGE_BYTES, based_of(pages))
        duration_s = send_s + ROUND_FIXED_S
        passed_s += duration_s
        sending.rest(ROUND_FIXED_S)
        dirty = given.curve.pages(duration_s)
        goodput = rounds[-1].goodput_bytes_per_s if rounds else ASSUMED_GOODPUT_BYTES_PER_S
        if sent >= TELLING_PAGES and send_s > 0:
            goodput = sent * PAGE_BYTES / send_s
        rounds.append(
            RoundStats(
                number=len(rounds),
                duration_s=duration_s,
                sent_pages=int(sent),
                wire_bytes=0,
                dirty_pages=int(dirty),
                dirty_rate_pages_per_s=dirty / duration_s,
                goodput_bytes_per_s=goodput,
            )
        )
        pages, zeros = dirty, 0.0
        base_share = 1.0 if len(rounds) > 1 else FIRST_BASE_SHARE if duration_s > FIRST_LOOK_S else 0.0
        is_out_of_time = 0 < policy.timeout_s < passed_s
        decision = decide(rounds, policy, ASSUMED_FIXED_S)
        because = decision.because
        if is_out_of_time or decision.next is not Next.AGAIN:
            converges = not is_out_of_time and decision.next is Next.SWITCH_OVER
            break
        if near_at_s is None and is_in_sight(decision, policy):
            near_at_s = passed_s
    if is_out_of_time:
        because = f"the time limit of {policy.timeout_s:g} s passes first: {because}"
    if not converges and policy.on_timeout is OnTimeout.ABORT:
        # It is rolled back; the downtime is what it would have been.
        copy_s = pages * PAGE_BYTES / max(rounds[-1].goodput_bytes_per_s, 1.0)
        ended = _ended(
            conditions, given, sending, passed_s, given.fixed_s + copy_s, False, len(rounds), because
        )
        return replace(ended, total_s=given.overhead_s + passed_s)
    left_s = max(given.late_s - (passed_s - near_at_s if near_at_s is not None else 0.0), 0.0)
    if converges and (left_s > 0 or has_much_left(decision, ASSUMED_FIXED_S)):
        # What is written until the second preflight and the arming are over is harvested and sent before the stop.
        sending.rest(left_s)
        pages = given.curve.pages(rounds[-1].duration_s + left_s)
        for catch_ups in itertools.count(1):
            sent = pages
            took_s = sending.send(sent * PAGE_BYTES, 0.0, based_of(sent)) + ROUND_FIXED_S
            sending.rest(ROUND_FIXED_S)
            passed_s += took_s
            pages = given.curve.pages(took_s)
            if not catches_up(catch_ups, int(sent), int(pages)):
                break
    last_s = sending.send(pages * PAGE_BYTES, 0.0, based_of(pages)) + given.last_s
    return _ended(
        conditions, given, sending, passed_s, given.fixed_s + last_s, converges, len(rounds), because
    )


def _ended(
    conditions: Conditions,
    given: Circumstances,
    sending: _Sending,
    rounds_s: float,
    downtime_s: float,
    converges: bool,
    rounds: int,
    because: str,
) -> Rehearsed:
    total_s = given.overhead_s + rounds_s + downtime_s
    cpu_s = cpu_of(
        conditions,
        pages_cpu_s=sending.cpu_s,
        populated_bytes=given.populated_pages * PAGE_BYTES,
        total_s=total_s,
    )
    return Rehearsed(
        total_s=total_s,
        downtime_s=downtime_s,
        wire_bytes=sending.wire_bytes,
        cpu_s=given.cpu_factor * cpu_s,
        converges=converges,
        rounds=rounds,
        because=because,
    )
