"""The CPU of a libvirt guest, as the XML of its domain says it.

Law: pure, and safe with hostile input, as `migrate.cpufiles`. Of a guest that runs, libvirt has written out every
feature in which its CPU differs from the model (`check='full'`); of one that does not, or of a mode that follows its
host, the XML does not say what the guest has, and neither does this.

Source: libvirt docs/formatdomain, "CPU model and topology".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from migrate.cpufiles import MAX_FEATURES, NAME_OF_CPU, CpuFileInvalid, parse_xml, refuse_large
from migrate.cpunames import canonical_all

__all__ = ["DomainCpu", "read_domain_cpu"]

# Shorter than what libvirt takes, and longer than what anybody types.
_MAX_NAME_CHARS: Final = 256
_ADDS: Final = ("require", "force")
_REMOVES: Final = ("disable", "forbid")
# libvirt's own words for a CPU that is whatever the host has.
_HOST_MODES: Final = ("host-passthrough", "maximum", "host-model")


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCpu:
    """A domain's CPU. `check` is libvirt's: `full` where the features are all that differ from `model`."""

    domain: str
    mode: str
    check: str
    model: str
    vendor: str
    added: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def problem(self) -> str:
        """Say why its features are not known, or nothing."""
        if self.mode in _HOST_MODES:
            return (
                f"libvirt runs {self.domain} with the CPU mode {self.mode}: what that comes to depends on its host, "
                "and the XML does not say it; `vmferry check` asks the guest itself"
            )
        if not self.model:
            return f"the XML of {self.domain} names no CPU model: the guest has its hypervisor's default"
        return ""

    def features(self, models: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
        """Give what the guest has, by what a model has; None where that one is not among `models`."""
        base = models.get(self.model)
        return None if base is None else (base | frozenset(self.added)) - frozenset(self.removed)


def read_domain_cpu(content: bytes) -> DomainCpu:
    """Read what `virsh dumpxml GUEST` prints.

    Raises:
        CpuFileInvalid: the author's: it is no XML of a domain, or no CPU is in it.
    """
    refuse_large(content)
    reader = _DomainReader()
    parse_xml(content, reader)
    if reader.root != "domain":
        raise CpuFileInvalid(f"it begins with <{reader.root:.40}>, and the XML of a guest with <domain>")
    if not reader.has_cpu:
        raise CpuFileInvalid("the guest has no <cpu>: it was started with its hypervisor's default")
    if reader.model and not NAME_OF_CPU.fullmatch(reader.model):
        raise CpuFileInvalid(f"{reader.model!r:.40} is no name of a model")
    return DomainCpu(
        domain=reader.name or "the guest",
        mode=reader.attributes.get("mode", "custom")[:40],
        check=reader.attributes.get("check", "none")[:40],
        model=reader.model,
        vendor=reader.vendor[:40],
        added=canonical_all(reader.added),
        removed=canonical_all(reader.removed),
    )


class _DomainReader:
    """Hears the elements of a domain; only its own name and its own CPU count, however deep others hide."""

    def __init__(self) -> None:
        self.root = self.name = self.model = self.vendor = ""
        self.has_cpu = False
        self.attributes: dict[str, str] = {}
        self.added: set[str] = set()
        self.removed: set[str] = set()

    def begin(self, inside: Sequence[str], attributes: dict[str, str]) -> None:
        self.root = self.root or inside[0]
        match inside:
            case ["domain", "cpu"]:
                self.has_cpu, self.attributes = True, attributes
            case ["domain", "cpu", "feature"]:
                self._take(attributes.get("name", ""), attributes.get("policy", "require"))

    def end(self, inside: Sequence[str]) -> None:
        pass

    def text(self, inside: Sequence[str], words: str) -> None:
        match inside:
            case ["domain", "name"]:
                self.name = (self.name + words)[:_MAX_NAME_CHARS]
            case ["domain", "cpu", "model"]:
                self.model = (self.model + words.strip())[:_MAX_NAME_CHARS]
            case ["domain", "cpu", "vendor"]:
                self.vendor = (self.vendor + words.strip())[:_MAX_NAME_CHARS]

    def _take(self, name: str, policy: str) -> None:
        if not NAME_OF_CPU.fullmatch(name):
            raise CpuFileInvalid(f"{name!r:.40} is no name of a feature")
        if policy in _ADDS:
            self.added.add(name)
        elif policy in _REMOVES:
            self.removed.add(name)
        # `optional`: libvirt has written out which of them the guest has, as one of the others.
        if len(self.added) + len(self.removed) > MAX_FEATURES:
            raise CpuFileInvalid(f"more than {MAX_FEATURES} features")
