"""What every migrate.ports.DirtyTracker must do."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pytest

from memory.errors import TrackerError
from memory.runs import Gfns, expand, runs_of_gfns
from migrate.ports import DirtyTracker

__all__ = ["DirtyTrackerContract", "TrackedGuest"]

TOTAL_PAGES = 4096


class TrackedGuest(Protocol):
    """A guest of TOTAL_PAGES pages under a tracker that is not started yet, and a way to let it write."""

    @property
    def tracker(self) -> DirtyTracker: ...

    def write(self, gfns: Gfns) -> None:
        """Return after the guest wrote to these pages."""
        ...


def _harvested(guest: TrackedGuest) -> list[int]:
    runs = guest.tracker.harvest()
    assert runs.dtype == np.int64
    assert (runs[:, 1] > 0).all()
    assert (runs[1:, 0] >= runs[:-1].sum(axis=1)).all(), "runs are out of order or overlap"
    return [int(gfn) for gfn in expand(runs)]


class DirtyTrackerContract:
    """Inherit, and give a fixture `tracked`: a TrackedGuest."""

    def test_the_log_begins_empty_and_a_harvest_empties_it(self, tracked: TrackedGuest) -> None:
        tracked.write(np.array([1, 2, 3]))
        tracked.tracker.start()
        assert _harvested(tracked) == []
        tracked.write(np.array([2, 7]))
        assert _harvested(tracked) == [2, 7]
        assert _harvested(tracked) == []

    def test_a_harvest_is_exactly_the_pages_written_since_the_last(self, tracked: TrackedGuest) -> None:
        rng = np.random.default_rng(5)
        tracked.tracker.start()
        for count in (1, 3, 700, TOTAL_PAGES // 2, TOTAL_PAGES):
            gfns = np.sort(rng.choice(TOTAL_PAGES, count, replace=False)).astype(np.int64)
            tracked.write(gfns)
            assert _harvested(tracked) == gfns.tolist()

    def test_first_writes_to_holes_and_the_edges_are_seen(self, tracked: TrackedGuest) -> None:
        tracked.tracker.start()
        tracked.write(np.array([0, TOTAL_PAGES - 1]))
        assert tracked.tracker.harvest().tolist() == runs_of_gfns(np.array([0, TOTAL_PAGES - 1])).tolist()

    def test_a_tracker_that_does_not_run_gives_no_harvest(self, tracked: TrackedGuest) -> None:
        with pytest.raises(TrackerError):
            tracked.tracker.harvest()
        tracked.tracker.start()
        tracked.tracker.stop()
        with pytest.raises(TrackerError):
            tracked.tracker.harvest()

    def test_stopping_twice_is_allowed_and_the_guest_goes_on(self, tracked: TrackedGuest) -> None:
        tracked.tracker.start()
        tracked.write(np.array([5]))
        tracked.tracker.stop()
        tracked.tracker.stop()
        tracked.write(np.array([5, 6]))

    def test_the_method_has_a_name(self, tracked: TrackedGuest) -> None:
        assert tracked.tracker.method
