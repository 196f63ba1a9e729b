"""One journal per migration, made with its first entry: a move that is refused at once leaves no file.

Law: nothing is decided here; see `agents.journal` for what is on the disk.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.to_thread

from agents.journal import AsyncJournal, JournalFile

__all__ = ["LazyJournal"]


class LazyJournal:
    """`migrate.ports.Journal` of one migration on this host."""

    def __init__(self, state_dir: Path, migration_id: str) -> None:
        self._state_dir = state_dir
        self._migration_id = migration_id
        self._journal: AsyncJournal | None = None
        self._opening = anyio.Lock()

    async def append(self, step: str, **facts: str | int | bytes | bool) -> None:
        """Return when the entry is durable. Raises JournalFailed: the step must not be taken."""
        async with self._opening:
            if self._journal is None:
                file = await anyio.to_thread.run_sync(JournalFile.create, self._state_dir, self._migration_id)
                self._journal = AsyncJournal(file)
        await self._journal.append(step, **facts)

    async def aclose(self, *, ended: bool) -> None:
        """Close it; `ended` moves it to the history, otherwise a restart asks about it."""
        if self._journal is not None:
            await self._journal.aclose(ended=ended)
