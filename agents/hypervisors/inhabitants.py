"""The machines of a host, as little as the survey of the host must know of each.

Law: values and a Protocol; each hypervisor's driver answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Inhabitant", "Inhabited"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inhabitant:
    """One machine on this host, running or on its way here; RAM and vCPUs are what it may have at most."""

    guest_id: str
    ram_bytes: int
    vcpus: int
    pid: int


class Inhabited(Protocol):
    """A driver, as the survey of its host sees it."""

    async def inhabitants(self) -> tuple[Inhabitant, ...]:
        """Give all machines that are here. May be a moment old: a survey asks right after the driver was asked."""
        ...
