"""One host: what its hypervisor can give, what it has against a guest, and what is seen of it besides."""

from __future__ import annotations

from dataclasses import dataclass, field

from migrate.facts.capacity import CapacityFacts
from migrate.facts.cpu import CpuFacts, HostCpuFacts
from migrate.facts.hardware import HostHardware
from migrate.facts.security import SecurityFacts

__all__ = ["HostFacts", "Objection", "Survey"]


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
    hardware: HostHardware = field(default_factory=HostHardware)
    cpu_host: HostCpuFacts = field(default_factory=HostCpuFacts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objection:
    """What a host's driver has against a guest that wants to come. `check` is stable, as a finding's is."""

    check: str
    found: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What an agent sees of its own host, whatever the hypervisor. Both ends make one, at nearly the same moment.

    `at_s` is the host's wall clock, in Unix time. What is None was not looked at.
    """

    at_s: float
    capacity: CapacityFacts | None = None
    security: SecurityFacts | None = None
