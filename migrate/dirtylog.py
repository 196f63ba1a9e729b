"""The log of a guest's writes, as one migration uses it.

Law: what is harvested is nowhere else: whoever harvests lets no cancellation come between that and keeping it.
"""

from __future__ import annotations

import anyio.to_thread

from memory.errors import TrackerLost
from memory.runs import Runs, empty_runs
from migrate.errors import MigrationFailed
from migrate.ports import DirtyTracker

__all__ = ["DirtyLog"]


class DirtyLog:
    """A guest's `migrate.ports.DirtyTracker`, off the event loop. May stay unused: a suspended guest writes nothing."""

    def __init__(self, tracker: DirtyTracker) -> None:
        self._tracker = tracker
        self._runs = False

    async def start(self) -> None:
        """From now on no write is missed.

        Raises:
            TrackerError: the guest is as before.
        """
        await anyio.to_thread.run_sync(self._tracker.start)
        self._runs = True

    async def stop(self) -> None:
        """Leave the guest as it was. May be called twice."""
        self._runs = False
        await anyio.to_thread.run_sync(self._tracker.stop)

    async def harvest(self) -> Runs:
        """Take the pages written since the last harvest; none where no log runs.

        Raises:
            MigrationFailed: the log has a gap.
        """
        runs = empty_runs()
        if self._runs:
            try:
                runs = await anyio.to_thread.run_sync(self._tracker.harvest)
            except TrackerLost as exc:
                raise MigrationFailed(f"the dirty log was lost: {exc}") from exc
        return runs
