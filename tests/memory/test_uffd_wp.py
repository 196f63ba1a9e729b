"""The dirty log of another process, as the kernel keeps it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from memory import linux
from memory.dirty import TrackedArea, probe_kernel
from memory.errors import TrackerError, TrackerLost
from memory.layout import PAGE_BYTES, Layout
from memory.ram import MappedRam, create_ram_file
from memory.runs import Gfns, check_runs, expand, whole
from memory.uffd_wp import UffdWpTracker, open_uffd
from tests.contracts.dirty_tracker import TOTAL_PAGES, DirtyTrackerContract
from tests.memory.guest_process import GuestProcess

if not probe_kernel().uffd_wp:
    pytest.skip(f"uffd-wp does not work here: {probe_kernel().problems}", allow_module_level=True)

LAYOUT = Layout.of_sizes([("ram", TOTAL_PAGES * PAGE_BYTES)])


@dataclass
class Tracked:
    tracker: UffdWpTracker
    guest: GuestProcess
    ram: MappedRam

    def write(self, gfns: Gfns) -> None:
        self.guest.write(gfns)


@pytest.fixture(scope="module")
def guest_and_ram() -> Iterator[tuple[GuestProcess, MappedRam]]:
    fd = create_ram_file(LAYOUT, "guest")
    ram = MappedRam(fd, LAYOUT)
    guest = GuestProcess(fd, TOTAL_PAGES)
    os.close(fd)
    yield guest, ram
    guest.close()
    ram.close()


@pytest.fixture
def tracked(guest_and_ram: tuple[GuestProcess, MappedRam]) -> Iterator[Tracked]:
    guest, ram = guest_and_ram
    ram.scatter_zeros(whole(TOTAL_PAGES))
    tracker = guest.track()
    yield Tracked(tracker, guest, ram)
    tracker.stop()


def contents(ram: MappedRam) -> bytearray:
    octets = bytearray(LAYOUT.total_bytes)
    ram.gather(whole(TOTAL_PAGES), memoryview(octets))
    return octets


class TestUffdWpTracker(DirtyTrackerContract):
    """The fixture `tracked` of this module."""


def test_reading_a_page_does_not_make_it_dirty(tracked: Tracked) -> None:
    tracked.tracker.start()
    tracked.write(np.arange(0, TOTAL_PAGES, 3))
    tracked.tracker.harvest()
    contents(tracked.ram)
    assert len(tracked.tracker.harvest()) == 0


@pytest.mark.slow
def test_no_write_is_lost_while_harvests_run(tracked: Tracked) -> None:
    tracked.tracker.start()
    copy = np.frombuffer(contents(tracked.ram), dtype=np.uint8).reshape(-1, PAGE_BYTES).copy()
    buffer = memoryview(bytearray(LAYOUT.total_bytes))

    def copy_dirty() -> int:
        runs = tracked.tracker.harvest()
        size = tracked.ram.gather(runs, buffer)
        copy[expand(runs)] = np.frombuffer(buffer[:size], dtype=np.uint8).reshape(-1, PAGE_BYTES)
        return len(runs)

    tracked.guest.tell("run")
    rounds_with_writes = 0
    while rounds_with_writes < 100:
        rounds_with_writes += copy_dirty() > 0
    writes = tracked.guest.tell("halt")
    copy_dirty()
    assert copy.view(np.uint64)[:, 0].sum() == writes
    assert copy.tobytes() == contents(tracked.ram)


def test_more_regions_than_one_scan_holds_are_all_found(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory.uffd_wp._REGIONS", 7)
    tracked.tracker.start()
    gfns = np.arange(1, TOTAL_PAGES, 2)
    tracked.write(gfns)
    assert (expand(tracked.tracker.harvest()) == gfns).all()
    assert len(tracked.tracker.harvest()) == 0


def test_a_tail_that_is_scanned_twice_leaves_the_log_in_order(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, ends = linux.pagemap_take_written, []

    def scan_with_an_end_too_low(
        pagemap: int, start: int, end: int, regions: NDArray[np.uint64]
    ) -> tuple[int, int]:
        rows, walk_end = scan(pagemap, start, end, regions)
        ends.append(walk_end)
        if len(ends) > 1:
            return rows, walk_end
        tracked.write(np.array([30, 50, 51]))
        return rows, start + 20 * PAGE_BYTES

    monkeypatch.setattr(linux, "pagemap_take_written", scan_with_an_end_too_low)
    tracked.tracker.start()
    tracked.write(np.array([3, 50, 52, TOTAL_PAGES - 1]))
    runs = tracked.tracker.harvest()
    assert len(ends) > 1
    check_runs(runs, TOTAL_PAGES)
    assert expand(runs).tolist() == [3, 30, 50, 51, 52, TOTAL_PAGES - 1]


def test_a_closed_userfaultfd_is_a_lost_log_and_never_an_empty_one(tracked: Tracked) -> None:
    tracked.tracker.start()
    tracked.write(np.array([1]))
    with open("/dev/null", "rb") as null:
        os.dup2(null.fileno(), tracked.tracker._uffd)
    with pytest.raises(TrackerLost, match="gap"):
        tracked.tracker.harvest()


def test_half_of_ram_unprotected_is_a_lost_log(tracked: Tracked) -> None:
    tracker = tracked.guest.track(keep_copy=True)
    tracker.start()
    tracked.guest.tell("unregister")
    with pytest.raises(TrackerLost):
        tracker.harvest()
    tracker.stop()


def test_pages_that_were_given_back_are_absent_and_in_no_harvest(tracked: Tracked) -> None:
    tracked.write(np.arange(0, 100))
    tracked.tracker.start()
    given_back = np.array([[10, 5], [50, 1]], dtype=np.int64)
    tracked.ram.scatter_zeros(given_back)
    assert set(expand(given_back)) <= set(expand(tracked.tracker.absent()))
    assert not set(range(10)) & set(expand(tracked.tracker.absent()))
    assert len(tracked.tracker.harvest()) == 0
    tracked.write(np.array([11]))
    assert tracked.tracker.harvest().tolist() == [[11, 1]]


def test_absent_pages_need_a_log_that_runs(tracked: Tracked) -> None:
    with pytest.raises(TrackerError, match="not running"):
        tracked.tracker.absent()


def test_a_second_tracker_is_told_about_the_first(tracked: Tracked) -> None:
    tracked.tracker.start()
    second = tracked.guest.track()
    with pytest.raises(TrackerError, match="another tracker holds"):
        second.start()
    tracked.write(np.array([9]))
    assert tracked.tracker.harvest().tolist() == [[9, 1]]


def test_after_a_stop_the_guest_can_be_tracked_anew(tracked: Tracked) -> None:
    tracked.tracker.start()
    tracked.write(np.array([1, 2]))
    tracked.tracker.stop()
    again = tracked.guest.track()
    again.start()
    tracked.write(np.array([2, 3]))
    assert again.harvest().tolist() == [[2, 2]]
    again.stop()


def test_a_tracker_starts_only_once(tracked: Tracked) -> None:
    tracked.tracker.start()
    with pytest.raises(TrackerError, match="a new one is needed"):
        tracked.tracker.start()
    tracked.tracker.stop()
    with pytest.raises(TrackerError, match="a new one is needed"):
        tracked.tracker.start()


@pytest.mark.slow
def test_an_ended_guest_is_an_error_and_not_a_clean_guest() -> None:
    fd = create_ram_file(LAYOUT, "guest")
    guest = GuestProcess(fd, TOTAL_PAGES)
    os.close(fd)
    tracker, late = guest.track(), guest.track()
    tracker.start()
    guest.write(np.array([1]))
    guest.kill()
    with pytest.raises(TrackerError, match="has ended"):
        tracker.harvest()
    tracker.stop()
    with pytest.raises(TrackerError, match="cannot track"):
        late.start()
    guest.close()


def test_a_userfaultfd_that_was_used_before_is_refused_and_closed() -> None:
    uffd = open_uffd()
    linux.uffd_api(uffd, linux.UFFD_FEATURES_WP_LOG)
    tracker = UffdWpTracker(uffd, os.getpid(), (TrackedArea(address=PAGE_BYTES, pages=1, first_gfn=0),))
    with pytest.raises(TrackerError, match=r"Linux 6\.7"):
        tracker.start()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(uffd)


def test_an_area_where_nothing_is_mapped_is_refused() -> None:
    tracker = UffdWpTracker(open_uffd(), os.getpid(), (TrackedArea(address=1 << 46, pages=1, first_gfn=0),))
    with pytest.raises(TrackerError, match="cannot track the writes"):
        tracker.start()


def test_areas_that_cannot_be_close_the_userfaultfd() -> None:
    uffd = open_uffd()
    with pytest.raises(TrackerError, match="no area"):
        UffdWpTracker(uffd, os.getpid(), ())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(uffd)
