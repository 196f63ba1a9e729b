"""What the demo's story needs of a guest, whichever kind it is.

Law: a Protocol and values. Each kind is a module beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

__all__ = ["DemoGuest", "Look", "Watcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at the guest from outside.

    `ticks` and `work` are counters of its own that only rise: of what it has done, and of how much it has executed or
    checked (`work_unit` says which). `written` are pages of its RAM; `errors` what its own checks of its memory found.
    """

    ticks: int
    work: int
    work_unit: str
    written: int
    errors: int
    is_running: bool
    state: str
    problem: str = ""


class Watcher(Protocol):
    """Looks at the guest on the host that it leaves, for as long as it is there."""

    @property
    def last(self) -> Look: ...

    async def watch(self) -> None:
        """Look again and again until it is gone from there, or this is cancelled."""
        ...

    def has_ended(self) -> bool:
        """Whether its process on that host is no more."""
        ...


class DemoGuest(Protocol):
    """The guest of one demo, in the demo's directory."""

    @property
    def guest_id(self) -> str: ...
    @property
    def content_bytes(self) -> int:
        """How much of its RAM is not zero at first: what the first pass sends."""
        ...

    @property
    def sentence(self) -> str:
        """What it is, for people."""
        ...

    async def start(self, host: str) -> None:
        """Start it, and let it run a little. Raises AgentError."""
        ...

    def watching(self, host: str) -> AbstractAsyncContextManager[Watcher]: ...

    async def look(self, host: str) -> Look: ...

    async def take(self, host: str) -> object:
        """Stop it for good and take all of it, to be compared; None where there is nothing to compare it with."""
        ...

    async def run_unmoved(self, taken: object, tell: Callable[[str], None]) -> tuple[object, float] | None:
        """Run the same guest again without a move; give it as `take` does, and the seconds. None: it cannot be."""
        ...

    async def end(self) -> None:
        """End it on every host, whatever has happened. Not cancelled by anything."""
        ...
