"""Room: what a guest takes of any host, and what a host has to give and has promised already."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CapacityFacts", "GuestDemand", "MoveSlots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDemand:
    """What a guest takes beside its RAM. `balloon_bytes` is what its balloon leaves it now, None where nobody said."""

    vcpus: int
    has_balloon: bool = False
    balloon_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveSlots:
    """The migrations of a host, besides one of the guest that it is looked at for.

    `is_coming` and `is_leaving`: that guest's own migration, in that direction, is under way and was let in.
    """

    incoming: int
    incoming_limit: int
    outgoing: int
    outgoing_limit: int
    is_draining: bool
    is_coming: bool
    is_leaving: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityFacts:
    """One host. None is what its kernel or its drivers did not say.

    `promised_bytes` and `promised_vcpus` are those of all guests of this agent, running or on their way here, besides
    the one that it is looked at for. Pressures are the kernel's (PSI, `some avg60`), in percent of the time.
    """

    physical_bytes: int | None
    swap_bytes: int | None
    swap_free_bytes: int | None
    online_cpus: int | None
    load_5min: float | None
    memory_pressure: float | None
    cpu_pressure: float | None
    promised_bytes: int
    promised_vcpus: int
    memory_overcommit: float
    cpu_overcommit: float
    moves: MoveSlots
