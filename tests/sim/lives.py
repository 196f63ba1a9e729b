"""An agent's process in a world without processes: from its start to its crash.

Law: a crash is not a cancellation. Everything that a task does to the world passes `step`, which raises Crashed in
tasks of a life that is over: undo steps, shielded or not, entries of journals and records come to nothing, and what
was durable stays. Whose task it is says a context variable, which tasks pass on to those that they start.

Journals are real files. `mortal_journals` and `in_place_of_a_thread` put `step` between them and the procedures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar
from unittest.mock import patch

import anyio
import anyio.lowlevel

from agents.journal import JournalEntry, JournalFile, pack_entry
from tests.faults import FusedStream

__all__ = ["LIFE", "Crashed", "Death", "Life", "in_place_of_a_thread", "mortal_journals", "step"]

_T = TypeVar("_T")


class Crashed(BaseException):
    """Raised in the tasks of an agent that is no more. No exception that an agent could survive."""


class Death(Protocol):
    """Who decides when an agent dies."""

    def comes_at(self, life: Life, what: str) -> bool:
        """Tell whether this agent dies now, just before or after `what`."""
        ...

    def tears(self) -> bool:
        """Tell whether half of a journal's entry reaches the disk."""
        ...


class Life:
    """One process of an agent, from its start to its end."""

    def __init__(self, host: str, death: Death) -> None:
        self.host = host
        self.is_over = False
        self.scope = anyio.CancelScope()
        self.has_ended = anyio.Event()
        self.streams: list[FusedStream] = []
        self.journals: list[JournalFile] = []
        self._death = death

    def meets_death_at(self, what: str) -> bool:
        return not self.is_over and self._death.comes_at(self, what)

    @property
    def tears(self) -> bool:
        return self._death.tears()

    def end(self) -> None:
        """Die, or be gone after an orderly end: its connections break, as a kernel sees to."""
        if self.is_over:
            return
        self.is_over = True
        self.scope.cancel()
        for stream in self.streams:
            stream.cut()
        self.has_ended.set()

    def close_files(self) -> None:
        """Take its journals from it, as a kernel does; not from the middle of a write to one."""
        for journal in self.journals:
            descriptor, journal._descriptor = journal._descriptor, None
            if descriptor is not None:
                os.close(descriptor)


LIFE: ContextVar[Life | None] = ContextVar("LIFE", default=None)


def step(what: str = "") -> None:
    """Pass if this task's agent lives. One that does may die here, at `what`; a step without a name only asks."""
    life = LIFE.get()
    if life is None:
        return
    if what and life.meets_death_at(what):
        life.end()
    if life.is_over:
        raise Crashed(life.host)


async def in_place_of_a_thread(call: Callable[..., _T], *arguments: object, **options: object) -> _T:
    """`anyio.to_thread.run_sync` on a virtual clock: the same call, at once, in this task."""
    await anyio.lowlevel.checkpoint()
    step()
    return call(*arguments)


@contextmanager
def mortal_journals() -> Iterator[None]:
    """Let agents die just before and after an entry is durable, and in the middle of writing it."""
    begin, append = JournalFile.__init__, JournalFile.append

    def mortal_begin(self: JournalFile, *arguments: object) -> None:
        begin(self, *arguments)  # type: ignore[arg-type]
        if (life := LIFE.get()) is not None:
            life.journals.append(self)

    def mortal_append(self: JournalFile, entry: JournalEntry) -> None:
        life = LIFE.get()
        if life is not None and life.meets_death_at(f"journal before {entry.step}"):
            if life.tears and self._descriptor is not None:
                record = pack_entry(entry)
                os.write(self._descriptor, record[: len(record) // 2])
            life.end()
        step()
        append(self, entry)
        step(f"journal after {entry.step}")

    with (
        patch.object(JournalFile, "__init__", mortal_begin),
        patch.object(JournalFile, "append", mortal_append),
    ):
        yield
