"""All cases, area by area."""

from __future__ import annotations

from tests.preflight import cpu, hosts
from tests.preflight.cases import CASES, Case

__all__ = ["AREAS", "all_cases"]

# Importing an area registers its cases.
AREAS = (hosts, cpu)


def all_cases() -> list[Case]:
    return list(CASES)
