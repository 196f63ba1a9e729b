"""The fakes keep the contracts of what they replace."""

from __future__ import annotations

import pytest

from memory.errors import OutOfRam, TrackerLost
from memory.runs import Gfns, runs_of_gfns
from tests.contracts.dirty_tracker import DirtyTrackerContract
from tests.contracts.guest_ram import TOTAL_PAGES, GuestRamContract
from tests.fakes.ram import BytesRam
from tests.fakes.tracker import ScriptedTracker
from tests.memory.strategies import page, run


class ScriptedGuest:
    def __init__(self) -> None:
        self.tracker = ScriptedTracker()

    def write(self, gfns: Gfns) -> None:
        self.tracker.mark(runs_of_gfns(gfns))


class TestBytesRam(GuestRamContract):
    @pytest.fixture
    def ram(self) -> BytesRam:
        return BytesRam(TOTAL_PAGES)


class TestScriptedTracker(DirtyTrackerContract):
    @pytest.fixture
    def tracked(self) -> ScriptedGuest:
        return ScriptedGuest()


def test_a_fake_host_runs_out_of_memory_at_its_limit_and_not_before() -> None:
    ram = BytesRam(4, limit_pages=2)
    ram.scatter(run((0, 2)), memoryview(page(1) * 2))
    ram.scatter(run((1, 1)), memoryview(page(2)))
    with pytest.raises(OutOfRam):
        ram.scatter(run((2, 1)), memoryview(page(3)))
    ram.scatter_zeros(run((0, 1)))
    ram.scatter(run((2, 1)), memoryview(page(3)))


def test_a_script_gives_its_harvests_and_loses_the_log_where_it_says() -> None:
    tracker = ScriptedTracker([run((0, 2)), run((9, 1))], lost_at=2)
    tracker.start()
    tracker.mark(run((1, 3)))
    assert tracker.harvest().tolist() == [[0, 4]]
    assert tracker.harvest().tolist() == [[9, 1]]
    for _ in range(2):
        with pytest.raises(TrackerLost):
            tracker.harvest()
    tracker.stop()
    tracker.start()
    assert len(tracker.harvest()) == 0
