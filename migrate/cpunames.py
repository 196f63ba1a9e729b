"""The names of CPU features: one spelling for each, whoever named it.

Law: pure. The spelling is that of QEMU's table of feature words, because drivers ask with it; QEMU's own aliases, those
of libvirt's CPU map, of RHEL 6's [cpudef] files and of Linux are folded into it. A name that nobody knows stays as it
is, with dashes.

Source: QEMU target/i386/cpu.c (feature_word_info; the aliases of x86_cpu_initfn), libvirt src/cpu_map/x86_features.xml.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import MappingProxyType
from typing import Final

__all__ = ["canonical", "canonical_all"]

# Where more than an underscore or a capital letter differs.
_ALIASES: Final = MappingProxyType(
    {
        "sse3": "pni",
        "sse4-1": "sse4.1",
        "sse4-2": "sse4.2",
        "pclmuldq": "pclmulqdq",
        "xd": "nx",
        "i64": "lm",
        "ffxsr": "fxsr-opt",
        "lzcnt": "abm",
        "cvt16": "f16c",
        "clfsh": "clflush",
        "arch-facilities": "arch-capabilities",
        "hv-apicv": "hv-avic",
    }
)


# No hypervisor has a longer one; a peer that names one is not remembered.
_MAX_REMEMBERED: Final = 64


def canonical(name: str) -> str:
    """Give the one spelling of a feature's name."""
    return _remembered(name) if len(name) <= _MAX_REMEMBERED else _fold(name)


def _fold(name: str) -> str:
    dashed = name.lower().replace("_", "-")
    return _ALIASES.get(dashed, dashed)


# The 131 models of QEMU 7.2 name 75 features 5768 times, and a preflight asks for all of them.
_remembered = functools.lru_cache(maxsize=4096)(_fold)


def canonical_all(names: Iterable[str]) -> tuple[str, ...]:
    """Give the names in their one spelling, each once, sorted."""
    return tuple(sorted({canonical(name) for name in names}))
