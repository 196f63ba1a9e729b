"""A guest that is looked at for a preflight and cannot be moved: its facts, and nothing to let go of."""

from __future__ import annotations

from dataclasses import dataclass

from migrate.facts import GuestFacts

__all__ = ["Seen"]


@dataclass(frozen=True, slots=True)
class Seen:
    """`migrate.ports.SeenGuest`."""

    facts: GuestFacts

    async def release(self) -> None:
        """Nothing is held."""
