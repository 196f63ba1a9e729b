"""A dirty log that says what the test wrote into it."""

from __future__ import annotations

from memory.errors import TrackerError, TrackerLost
from memory.runs import Runs, empty_runs, union

__all__ = ["ScriptedTracker"]


class ScriptedTracker:
    """A migrate.ports.DirtyTracker: `mark` is the guest's write, and `script` gives whole harvests beforehand.

    Args:
        script: what the first harvests find, one entry each, besides what was marked.
        lost_at: this harvest, counted from 0, raises TrackerLost, and so do all after it until the next start.
    """

    def __init__(self, script: list[Runs] | None = None, *, lost_at: int | None = None) -> None:
        self._script = list(script or ())
        self._lost_at = lost_at
        self._marked = empty_runs()
        self.harvests = 0
        self.is_started = False

    @property
    def method(self) -> str:
        return "scripted"

    def mark(self, runs: Runs) -> None:
        """Note pages as written; forgotten while the log is not running, as a real one does."""
        if self.is_started:
            self._marked = union(self._marked, runs)

    def start(self) -> None:
        self.is_started = True
        self._marked = empty_runs()

    def harvest(self) -> Runs:
        if not self.is_started:
            raise TrackerError("this tracker is not running")
        at, self.harvests = self.harvests, self.harvests + 1
        if self._lost_at is not None and at >= self._lost_at:
            self._lost_at = at
            raise TrackerLost("the script lost the log")
        found, self._marked = self._marked, empty_runs()
        return union(found, self._script.pop(0)) if self._script else found

    def stop(self) -> None:
        if self.is_started:
            self._lost_at = None
        self.is_started = False
