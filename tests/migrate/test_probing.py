from __future__ import annotations

import random
from dataclasses import dataclass
from typing import cast

import anyio
import pytest

from memory.errors import TrackerError
from memory.layout import PAGE_BYTES
from memory.runs import Runs, empty_runs, expand, whole
from migrate.errors import MigrationFailed
from migrate.facts import GuestFacts
from migrate.forecast import ContentSample
from migrate.ports import RunningGuest
from migrate.probing import probe, sample_content, watch_writes
from tests.agents.scripted_agent import guest_facts
from tests.fakes.ram import BytesRam
from tests.fakes.tracker import ScriptedTracker
from tests.memory.strategies import run

anyio_test = pytest.mark.anyio
SHORT_S = 0.1


@dataclass
class Probed:
    """As much of a RunningGuest as a probe may use."""

    tracker: ScriptedTracker
    ram: BytesRam
    facts: GuestFacts

    def as_guest(self) -> RunningGuest:
        return cast(RunningGuest, self)


def guest_of(tracker: ScriptedTracker, *, is_running: bool = True) -> Probed:
    return Probed(tracker, ram_with(128), guest_facts(is_running=is_running))


def ram_with(data_pages: int, *, total: int = 4096, noise: int = PAGE_BYTES) -> BytesRam:
    """Every second stretch of 64 pages has pages, whose first `noise` bytes do not shrink."""
    random_ = random.Random(1)
    ram = BytesRam(total)
    for gfn in [gfn for gfn in range(total) if gfn // 64 % 2][:data_pages]:
        ram.write(gfn, random_.randbytes(noise) + bytes(PAGE_BYTES - noise))
    return ram


class Refusing(ScriptedTracker):
    def start(self) -> None:
        raise TrackerError("no log here")


@anyio_test
async def test_a_probe_sees_windows_that_grow_and_leaves_no_log() -> None:
    # The first harvest belongs to the time in which the log was made.
    tracker = ScriptedTracker([whole(4000), *(whole(pages) for pages in (10, 20, 30, 40, 50))])
    load = await probe(guest_of(tracker).as_guest(), SHORT_S)
    assert [one.pages for one in load.windows] == [10, 20, 30, 40, 50]
    times = [one.window_s for one in load.windows]
    assert times[-1] > 4 * times[0] > 0
    assert SHORT_S <= load.took_s < 5
    assert load.populated_bytes == 128 * PAGE_BYTES
    assert not tracker.is_started


@anyio_test
async def test_a_paused_guest_is_sampled_and_not_watched() -> None:
    tracker = ScriptedTracker()
    load = await probe(guest_of(tracker, is_running=False).as_guest(), 30.0)
    assert load.windows == ()
    assert load.sample.pages == 128
    assert tracker.harvests == 0


@anyio_test
async def test_a_cancelled_probe_leaves_no_log() -> None:
    tracker = ScriptedTracker()
    with anyio.move_on_after(0.1) as scope:
        await watch_writes(tracker, 30.0)
    assert scope.cancelled_caught
    assert tracker.harvests > 0
    assert not tracker.is_started


@anyio_test
@pytest.mark.parametrize("lost_at", range(6))
async def test_a_lost_log_ends_the_probe_and_leaves_no_log(lost_at: int) -> None:
    tracker = ScriptedTracker(lost_at=lost_at)
    with pytest.raises(MigrationFailed, match="lost"):
        await watch_writes(tracker, SHORT_S)
    assert not tracker.is_started


@anyio_test
async def test_a_guest_whose_writes_cannot_be_seen_is_not_probed() -> None:
    with pytest.raises(TrackerError, match="no log here"):
        await watch_writes(Refusing(), SHORT_S)


@anyio_test
@pytest.mark.parametrize("asked_s", [-5.0, 0.0])
async def test_a_probe_takes_some_time_whatever_was_asked(asked_s: float) -> None:
    load = await probe(guest_of(ScriptedTracker()).as_guest(), asked_s)
    assert load.took_s >= 0.1


def test_a_sample_tells_zeros_and_what_shrinks() -> None:
    half_noise = sample_content(ram := ram_with(2048, noise=PAGE_BYTES // 2), ram.populated_runs())
    assert half_noise.pages == 512
    assert half_noise.zero_pages == 0
    assert 0.45 < half_noise.zstd_bytes / (512 * PAGE_BYTES) < 0.6
    zeros = sample_content(ram := ram_with(2048, noise=0), ram.populated_runs())
    assert (zeros.zero_pages, zeros.duplicate_pages, zeros.zstd_bytes) == (512, 0, 0)
    noise = sample_content(ram := ram_with(2048), ram.populated_runs())
    assert noise.zstd_bytes == 512 * PAGE_BYTES


def test_a_sample_counts_pages_that_another_equals() -> None:
    ram = BytesRam(512)
    for gfn in range(512):
        ram.write(gfn, bytes([gfn % 2 + 1]) * PAGE_BYTES)
    found = sample_content(ram, ram.populated_runs())
    assert found.duplicate_pages == found.pages - 2


@pytest.mark.parametrize("pages", [1, 15, 16, 17, 128, 511, 513])
def test_a_small_guest_is_sampled_whole_and_a_large_one_is_not(pages: int) -> None:
    ram = ram_with(pages)
    found = sample_content(ram, ram.populated_runs())
    assert 0 < found.pages <= min(pages, 512)
    # Holes are not read: that would make pages.
    assert ram.populated_runs()[:, 1].sum() == pages


def test_a_guest_without_a_page_has_an_empty_sample() -> None:
    assert sample_content(BytesRam(64), empty_runs()) == ContentSample(
        pages=0, zero_pages=0, duplicate_pages=0, zstd_bytes=0
    )


class Rewriting(ScriptedTracker):
    """A guest that writes so many bytes of each of its first pages before every harvest."""

    def __init__(self, ram: BytesRam, octets: int, pages: int = 100, *, wanders: bool = False) -> None:
        super().__init__([run((64, pages)) for _ in range(6)])
        self._ram, self._octets, self._random = ram, octets, random.Random(3)
        self._at, self._step = 0, octets if wanders else 0

    def harvest(self) -> Runs:
        runs, at, end = super().harvest(), self._at, self._at + self._octets
        for gfn in expand(runs).tolist():
            old = bytes(self._ram.contents[gfn * PAGE_BYTES : (gfn + 1) * PAGE_BYTES])
            self._ram.write(gfn, old[:at] + self._random.randbytes(self._octets) + old[end:])
        self._at += self._step
        return runs


@anyio_test
@pytest.mark.parametrize(
    ("octets", "low", "high"), [(8, 0.001, 0.02), (1024, 0.2, 0.4), (PAGE_BYTES, 1.0, 1.0)]
)
async def test_a_probe_sees_what_changes_in_a_page_that_is_written_again(
    octets: int, low: float, high: float
) -> None:
    guest = guest_of(ScriptedTracker())
    guest.ram = ram_with(256)
    guest.tracker = Rewriting(guest.ram, octets)
    load = await probe(guest.as_guest(), SHORT_S)
    # 64 of them in one stretch of noise; the others are holes at first.
    assert load.rewritten_pages == 100
    assert low <= load.delta_bytes / (100 * PAGE_BYTES) <= high


@anyio_test
async def test_what_has_changed_is_measured_when_a_page_is_written_again_and_not_long_after() -> None:
    # An eighth of a page further at each write: half of it and more would have changed at the end.
    guest = guest_of(ScriptedTracker())
    guest.ram = ram_with(256)
    guest.tracker = Rewriting(guest.ram, PAGE_BYTES // 8, 64, wanders=True)
    load = await probe(guest.as_guest(), SHORT_S)
    assert load.rewritten_pages == 64
    assert 0.1 < load.delta_bytes / (64 * PAGE_BYTES) < 0.15


@anyio_test
async def test_a_guest_that_writes_every_page_once_shows_nothing_of_deltas() -> None:
    tracker = ScriptedTracker([empty_runs(), *(run((64 + 10 * n, 10)) for n in range(5))])
    load = await probe(guest_of(tracker).as_guest(), SHORT_S)
    assert (load.rewritten_pages, load.delta_bytes) == (0, 0)
