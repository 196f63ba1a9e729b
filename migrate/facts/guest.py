"""One guest as its driver sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from migrate.facts.capacity import GuestDemand
from migrate.facts.cpu import CpuFacts, GuestCpuFacts
from migrate.facts.hardware import GuestHardware
from migrate.facts.security import Confinement
from migrate.facts.storage import DiskFacts

__all__ = ["BlockFacts", "GuestFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """One block of guest RAM. `bytes` is a multiple of the page size (4096)."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestFacts:
    """One guest as its driver sees it.

    `guest_id` is the identity that ownership is about: it stays the same on every host. `spec` is the
    driver's own description of the machine, from which the destination's driver makes an empty one; it is
    opaque to everything else and hostile to the driver that reads it. `machine` is the versioned type of the machine;
    `blockers` says, a sentence each, what about this guest as it is now lets nobody move it. `demand` and `confinement`
    are None where the driver did not look.
    """

    guest_id: str
    name: str
    hypervisor: str
    is_running: bool
    machine: str
    blocks: tuple[BlockFacts, ...]
    cpu: CpuFacts
    disks: tuple[DiskFacts, ...]
    spec: bytes
    blockers: tuple[str, ...] = ()
    demand: GuestDemand | None = None
    confinement: Confinement | None = None
    hardware: GuestHardware = field(default_factory=GuestHardware)
    cpu_run: GuestCpuFacts = field(default_factory=GuestCpuFacts)

    @property
    def is_described(self) -> bool:
        """A destination can make its machine; without a spec the guest can be looked at, and not moved."""
        return bool(self.spec)

    @property
    def ram_bytes(self) -> int:
        """All of the guest's RAM, holes included."""
        return sum(block.size_bytes for block in self.blocks)
