"""What is known of guests and hosts: frozen values that drivers give and that travel to the other end.

Law: values only, no behaviour beyond arithmetic on themselves. Everything in here may come from a peer, so
it is checked where it is used, never trusted.
"""

from __future__ import annotations

from migrate.facts.capacity import CapacityFacts, GuestDemand, MoveSlots
from migrate.facts.cpu import CpuFacts, GuestCpuFacts, HostCpuFacts
from migrate.facts.guest import BlockFacts, GuestFacts
from migrate.facts.hardware import (
    MAX_DEVICES,
    DeviceFacts,
    DeviceKind,
    FileFacts,
    FirmwareFacts,
    GuestHardware,
    HostHardware,
    RomFacts,
)
from migrate.facts.host import HostFacts, Objection, Survey
from migrate.facts.path import PathFacts
from migrate.facts.security import (
    ApparmorFacts,
    CertificateFacts,
    Confinement,
    Permission,
    SecurityFacts,
    SelinuxFacts,
)
from migrate.facts.storage import DiskFacts

__all__ = [
    "ApparmorFacts",
    "MAX_DEVICES",
    "BlockFacts",
    "CapacityFacts",
    "CertificateFacts",
    "Confinement",
    "CpuFacts",
    "DeviceFacts",
    "DeviceKind",
    "DiskFacts",
    "GuestDemand",
    "FileFacts",
    "FirmwareFacts",
    "GuestFacts",
    "GuestHardware",
    "GuestCpuFacts",
    "HostCpuFacts",
    "HostFacts",
    "MoveSlots",
    "Objection",
    "PathFacts",
    "Permission",
    "SecurityFacts",
    "SelinuxFacts",
    "HostHardware",
    "RomFacts",
    "Survey",
]
