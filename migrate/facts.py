"""What is known of guests and hosts: frozen values that drivers give and that travel to the other end.

Law: values only, no behaviour beyond arithmetic on themselves. Everything in here may come from a peer, so
it is checked where it is used, never trusted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """One block of guest RAM. `bytes` is a multiple of the page size (4096)."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFacts:
    """The CPU a guest was started with, or one that a host can give.

    `features` are CPUID feature names as QEMU spells them, sorted.
    """

    model: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """One disk of a guest. `path` is the path on the host that the facts come from."""

    name: str
    path: str
    size_bytes: int
    is_read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Objection:
    """What a host's driver has against a guest that wants to come. `check` is stable, as a finding's is."""

    check: str
    found: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestFacts:
    """One guest as its driver sees it.

    `guest_id` is the identity that ownership is about: it stays the same on every host. `spec` is the
    driver's own description of the machine, from which the destination's driver makes an empty one; it is
    opaque to everything else and hostile to the driver that reads it. `machine` is the versioned type of the machine;
    `blockers` says, a sentence each, what about this guest as it is now lets nobody move it.
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

    @property
    def ram_bytes(self) -> int:
        """All of the guest's RAM, holes included."""
        return sum(block.size_bytes for block in self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a host can give to one more guest of one hypervisor.

    `cpus` are the models its hypervisor can run, each with every feature it has there; `machines` the machine types.
    """

    name: str
    hypervisor: str
    cpus: tuple[CpuFacts, ...]
    machines: tuple[str, ...]
    free_memory_bytes: int
    guest_ids: tuple[str, ...]
