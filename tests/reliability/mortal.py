"""`python -m tests.reliability.mortal FILE N|NAME COMMAND...`: vmferry that is killed at an instant that matters.

It is the N-th, or the first of that name. An instant is just before and just after: an entry of a journal, a claim of
ownership, a question that changes something at the destination, the stop, the start or the end of a guest. Each is
written to FILE as it comes; the last line names the one that was died at. N < 0: none, only write them down.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from agents.cli.main import main
from agents.hypervisors.embedded.driver import EmbeddedIncomingGuest, EmbeddedRunningGuest
from agents.hypervisors.qemu.incoming import QemuIncomingGuest
from agents.hypervisors.qemu.running import QemuRunningGuest
from agents.journal import JournalEntry, JournalFile
from agents.storage import SharedDirs
from migrate.inspection import Asker
from migrate.messages import Arm, Commit, Load, Prepare

__all__ = ["Instants"]

CHANGES: Final = (Prepare, Arm, Load, Commit)

GUEST_CALLS: Final = ("pause_for_switchover", "save_device_state", "load_device_state", "resume", "destroy")


class Instants:
    """Counts instants and dies at one of them."""

    def __init__(self, path: Path, fatal: int | str) -> None:
        self._path = path
        self._fatal = fatal
        self._passed = 0
        self._one_at_a_time = threading.Lock()

    def pass_by(self, name: str) -> None:
        """One has come."""
        with self._one_at_a_time:
            with self._path.open("a") as file:
                print(name, file=file)
            if self._fatal in (name, self._passed):
                os.kill(os.getpid(), signal.SIGKILL)
            self._passed += 1


def note_calls(instants: Instants, of: type, name: str, called: str) -> None:
    """Have an async method pass by `before CALLED` and `after CALLED`."""
    original: Callable[..., Awaitable[object]] = getattr(of, name)

    @functools.wraps(original)
    async def watched(*arguments: object, **options: object) -> object:
        instants.pass_by(f"before {called}")
        result = await original(*arguments, **options)
        instants.pass_by(f"after {called}")
        return result

    setattr(of, name, watched)


def note_journal(instants: Instants) -> None:
    """Have every entry of a journal pass by before it is written, and when it is durable."""
    original = JournalFile.append

    def watched(self: JournalFile, entry: JournalEntry) -> None:
        instants.pass_by(f"before journal {entry.step}")
        original(self, entry)
        instants.pass_by(f"after journal {entry.step}")

    JournalFile.append = watched  # type: ignore[method-assign]


def note_questions(instants: Instants) -> None:
    """Have the questions that change something at the destination pass by, and their answers."""
    original = Asker.ask

    @functools.wraps(original)
    async def watched(
        self: Asker, request: object, *reply_types: type, timeout_s: float | None = None
    ) -> object:
        name = type(request).__name__
        if isinstance(request, CHANGES):
            instants.pass_by(f"before {name}")
        reply: object = await original(self, request, *reply_types, timeout_s=timeout_s)
        if isinstance(request, CHANGES):
            instants.pass_by(f"after {name}")
        return reply

    Asker.ask = watched  # type: ignore[assignment]


def note_all(instants: Instants) -> None:
    """Have everything pass by."""
    note_journal(instants)
    note_questions(instants)
    note_calls(instants, SharedDirs, "claim", "claim")
    for guest in (EmbeddedRunningGuest, EmbeddedIncomingGuest, QemuRunningGuest, QemuIncomingGuest):
        for name in GUEST_CALLS:
            if hasattr(guest, name):
                note_calls(instants, guest, name, name.replace("_", " "))


if __name__ == "__main__":
    told = sys.argv[2]
    note_all(Instants(Path(sys.argv[1]), int(told) if told.lstrip("-").isdigit() else told))
    sys.argv[1:] = sys.argv[3:]
    sys.exit(main())
