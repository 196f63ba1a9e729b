"""Disks, as the host sees them that the facts come from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DiskFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """One disk of a guest. `path` is the path on the host that the facts come from."""

    name: str
    path: str
    size_bytes: int
    is_read_only: bool
