"""CPUs: what a guest was started with, what a host can give, and what of a host a guest's CPU depends on.

An empty text, a zero and None say that it is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CpuFacts", "GuestCpuFacts", "HostCpuFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFacts:
    """The CPU a guest was started with, or one that a host can give.

    `features` are CPUID feature names as `migrate.cpunames` spells them, sorted. `vendor`, `family`, `number` (what
    CPUID calls the model) and `stepping` are what the guest reads; `level` and `xlevel` its highest leaves.
    `is_host_dependent`: what the model comes to depends on the host and on the hypervisor's version.
    """

    model: str
    features: tuple[str, ...]
    vendor: str = ""
    family: int = 0
    number: int = 0
    stepping: int = 0
    level: int = 0
    xlevel: int = 0
    is_host_dependent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestCpuFacts:
    """How a guest's CPU is run at the source.

    `is_native`: the host's own CPU runs the guest's code, nothing emulates it. `added` and `removed` are features that
    the guest was started with and without, beside its model's. `version` is that of the hypervisor that runs it,
    `host_vendor` the maker of the source's own CPU. `alternatives` are the models of the source that have everything
    the guest has, the nearest first.
    """

    is_native: bool = False
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    version: str = ""
    host_vendor: str = ""
    tsc_khz: int = 0
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCpuFacts:
    """What a host's hypervisor can give to any model with the guest's accelerator, and the CPU that the host has.

    `features` is everything that it can give at all; a model has less. `vendor`, `family` and `number` are of the
    host's own CPU, `tsc_khz` its time stamp counter's frequency, `has_tsc_scaling` whether a guest can have another.
    """

    is_native: bool = False
    version: str = ""
    features: tuple[str, ...] = ()
    vendor: str = ""
    family: int = 0
    number: int = 0
    tsc_khz: int = 0
    has_tsc_scaling: bool | None = None
