"""A guest's CPU beside what the destination's hypervisor can give: the sets that the checks of `cpu` ask about.

Law: pure. Names are compared in their one spelling, whatever the peer wrote. No check stands here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from migrate.cpunames import canonical, canonical_all
from migrate.facts import CpuFacts, GuestCpuFacts, HostCpuFacts
from migrate.preflight.evidence import Inspection

__all__ = ["HOST_MODELS", "MICROCODE", "NESTED", "CpuFit", "is_host_model", "is_state", "models_with"]

# Models that are whatever the host and the hypervisor's version give; the last two are libvirt's words.
HOST_MODELS: Final = frozenset({"host", "max", "host-passthrough", "maximum"})
# Features that a CPU of the same model has or has not by its microcode, and by what the host's kernel does with it.
MICROCODE: Final = frozenset(
    {
        *(
            "spec-ctrl",
            "ibrs",
            "ibpb",
            "stibp",
            "stibp-always-on",
            "amd-stibp",
            "ssbd",
            "amd-ssbd",
            "virt-ssbd",
        ),
        *("md-clear", "flush-l1d", "arch-capabilities", "core-capability", "ibrs-all", "rdctl-no", "mds-no"),
        *("skip-l1dfl-vmentry", "ssb-no", "amd-no-ssb", "pschange-mc-no", "taa-no", "tsx-ctrl", "amd-psfd"),
        *("psdp-no", "fbsdp-no", "fb-clear", "gds-no", "rfds-no", "rfds-clear", "sbdr-ssdp-no", "hle", "rtm"),
    }
)
NESTED: Final = frozenset({"vmx", "svm"})
# What has registers of its own beyond AVX's, or is how they are saved. AVX alone is any CPU's since 2011.
_STATE: Final = frozenset(
    {"xsave", "xsavec", "xsaves", "xsaveopt", "xgetbv1", "xfd", "mpx", "pku", "arch-lbr"}
)


def is_state(feature: str) -> bool:
    """Tell whether a feature means state components that XSAVE keeps."""
    return feature in _STATE or feature.startswith(("avx512", "amx-", "avx10"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFit:
    """One guest's CPU and one host. `model` is the destination's model of the guest's name, if it has one.

    `wanted` are the guest's features, `given` those that it would have there; `is_known` is False where nothing is
    known of what would be given.
    """

    guest: CpuFacts
    run: GuestCpuFacts
    host: HostCpuFacts
    model: CpuFacts | None
    wanted: frozenset[str]
    given: frozenset[str]
    is_known: bool
    fitting: tuple[str, ...]

    @classmethod
    def of(cls, inspection: Inspection) -> CpuFit:
        """Compare."""
        guest, run, host = inspection.guest.cpu, inspection.guest.cpu_run, inspection.host.cpu_host
        wanted = frozenset(canonical_all(guest.features))
        model = next((cpu for cpu in inspection.host.cpus if cpu.model == guest.model), None)
        at_all = frozenset(canonical_all(host.features))
        if model is None:
            given = at_all
        else:
            # The machine there is started with the same additions; it gets those that its hypervisor has at all.
            given = frozenset(canonical_all(model.features)) | (frozenset(canonical_all(run.added)) & at_all)
        return cls(
            guest=guest,
            run=run,
            host=host,
            model=model,
            wanted=wanted,
            given=given,
            is_known=model is not None or bool(at_all),
            fitting=models_with(wanted, inspection.host.cpus),
        )

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(sorted(self.wanted - self.given))

    @property
    def gained(self) -> tuple[str, ...]:
        """What the guest was not started with and would read there."""
        return tuple(sorted(self.given - self.wanted - frozenset(map(canonical, self.run.removed))))

    @property
    def is_host_dependent(self) -> bool:
        return is_host_model(self.guest) or (self.model is not None and is_host_model(self.model))

    @property
    def fitting_both(self) -> tuple[str, ...]:
        """Models that have all of the guest's features at either end, the nearest first."""
        here = frozenset(self.run.alternatives)
        return tuple(model for model in self.fitting if model in here)


def models_with(features: Iterable[str], cpus: Iterable[CpuFacts]) -> tuple[str, ...]:
    """Give the models that have all of these features, the nearest first; none that is whatever its host gives."""
    wanted = frozenset(canonical_all(features))
    fitting = sorted(
        (len(cpu.features), cpu.model)
        for cpu in cpus
        if not is_host_model(cpu) and wanted.issubset(canonical_all(cpu.features))
    )
    return tuple(model for _, model in fitting)


def is_host_model(cpu: CpuFacts) -> bool:
    """Tell whether the model is whatever its host gives."""
    return cpu.is_host_dependent or cpu.model.lower() in HOST_MODELS
