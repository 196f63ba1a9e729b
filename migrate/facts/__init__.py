"""What is known of guests and hosts: frozen values that drivers give and that travel to the other end.

Law: values only, no behaviour beyond arithmetic on themselves. Everything in here may come from a peer, so
it is checked where it is used, never trusted.
"""

from __future__ import annotations

from migrate.facts.cpu import CpuFacts
from migrate.facts.guest import BlockFacts, GuestFacts
from migrate.facts.host import HostFacts, Objection, Survey
from migrate.facts.storage import BackingFacts, DiskFacts, DiskKind, ImageFacts

__all__ = [
    "BackingFacts",
    "BlockFacts",
    "CpuFacts",
    "DiskFacts",
    "DiskKind",
    "GuestFacts",
    "HostFacts",
    "ImageFacts",
    "Objection",
    "Survey",
]
