"""Guests of this very host, without an agent: what `vmferry guest` asks of each kind of them.

Law: values and a Protocol; each hypervisor's folder has the implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

__all__ = ["LocalGuest", "LocalHypervisor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGuest:
    """One guest as a person sees it. `details` has the figures that only guests of its kind have, for `--json`."""

    kind: str
    guest_id: str
    name: str
    state: str
    pid: int
    ram_bytes: int
    cpu_model: str
    problem: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


class LocalHypervisor(Protocol):
    """All guests of one kind."""

    @property
    def place(self) -> Path:
        """The directory where they are found."""
        ...

    async def guests(self) -> list[LocalGuest]: ...

    async def start(self, description: Path) -> LocalGuest:
        """Start the guest that a file describes; it lives on. Raises AgentError."""
        ...

    async def stop(self, guest: LocalGuest, *, now: bool, timeout_s: float) -> None:
        """End a guest: ask its operating system where that is possible, or end it `now`. Raises AgentError."""
        ...

    async def console_text(self, guest: LocalGuest) -> str:
        """Give the last that it printed."""
        ...

    def console_socket(self, guest: LocalGuest) -> Path | None:
        """Give where a person can be attached to its console, if that is possible."""
        ...
