"""CPUs: what a guest was started with, and what a host can give."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CpuFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFacts:
    """The CPU a guest was started with, or one that a host can give.

    `features` are CPUID feature names as QEMU spells them, sorted.
    """

    model: str
    features: tuple[str, ...]
