"""All cases, area by area."""

from __future__ import annotations

from tests.preflight import cpu, devices, disks, hosts, netdisks, paths, pools, rooms
from tests.preflight.cases import CASES, Case

__all__ = ["AREAS", "all_cases"]

# Importing an area registers its cases.
AREAS = (hosts, cpu, devices, disks, netdisks, pools, paths, rooms)


def all_cases() -> list[Case]:
    return list(CASES)
