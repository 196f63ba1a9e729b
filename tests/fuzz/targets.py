"""All targets, by name. The one table that the command line, the suite and the engine read."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from tests.fuzz import of_files, of_guests, of_transport

__all__ = ["TARGETS"]

TARGETS: Final = MappingProxyType(
    {target.name: target for target in (*of_transport.TARGETS, *of_files.TARGETS, *of_guests.TARGETS)}
)
