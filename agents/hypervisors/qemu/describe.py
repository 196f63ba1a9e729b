"""What a running QEMU says of its guest: identity, RAM blocks, CPU, disks, what blocks a migration.

Law: asks by QMP and gives frozen facts; judges nothing but what cannot be. The few facts that QMP does not have (where
a block of RAM is mapped) come from the human monitor and are checked against the kernel (`processmap`).
"""

from __future__ import annotations

import contextlib
import re
from typing import Final

from agents.hypervisors.qemu.errors import QmpFailed
from agents.hypervisors.qemu.qmp import Json, Qmp, field_of
from agents.hypervisors.qemu.spec import QemuSpec
from migrate.cpunames import canonical_all
from migrate.facts import CpuFacts

__all__ = [
    "balloon_of",
    "block_places",
    "blockers_of",
    "changes_of",
    "cpu_of",
    "cpu_of_properties",
    "features_of_expansion",
    "is_confidential",
    "machine_of",
    "run_state",
    "tsc_khz_of",
    "vcpu_threads",
    "version_of",
]

_HVA: Final = re.compile(r"Host virtual address for (0x[0-9a-f]+) \(([^)]*)\) is (0x[0-9a-f]+)")
_REGION: Final = re.compile(r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio \d+, ram\): (\S+)", re.MULTILINE)
# Properties of a CPU object that are no features of the CPU.
_NO_FEATURES: Final = frozenset(
    {
        # Whether KVM's own leaves are shown is how a machine is started, not what a host can give.
        "kvm",
        *("realized", "hotplugged", "hotpluggable", "start-powered-off", "check", "enforce", "migratable"),
        *("fill-mtrr-mask", "full-cpuid-auto-level", "host-cache-info", "host-phys-bits", "legacy-cache"),
        *(
            "l3-cache",
            "cpuid-0xb",
            "tcg-cpuid",
            "vmware-cpuid-freq",
            "kvm-no-smi-migration",
            "x-force-features",
        ),
        *(
            "x-migrate-smi-count",
            "x-vendor-cpuid-only",
            "x-intel-pt-auto-level",
            "x-hv-synic-kvm-only",
            "lmce",
            "pmu",
        ),
    }
)
# What CPUID says of a CPU beside its features, as QEMU's CPU objects and models name it.
_IDENTITY: Final = ("vendor", "family", "model", "stepping", "level", "xlevel")
_MAX_REGISTER: Final = (1 << 32) - 1
_VENDOR_CHARS: Final = 12  # EBX, EDX, ECX of leaf 0
_MAX_HERTZ: Final = 1 << 40  # a terahertz: no counter is as fast
_VERSION_CHARS: Final = 40


async def run_state(qmp: Qmp) -> str:
    """Give QEMU's word for what the guest does: `running`, `paused`, `inmigrate`, `postmigrate`, ..."""
    return _text(await qmp.execute("query-status"), "query-status", "status")


async def machine_of(qmp: Qmp) -> str:
    """Give the versioned machine type that runs."""
    kind = await qmp.execute("qom-get", {"path": "/machine", "property": "type"})
    if not isinstance(kind, str) or not kind.endswith("-machine"):
        raise QmpFailed("qom-get /machine type", "nonsense", f"{kind!r:.80} is no machine")
    return kind.removesuffix("-machine")


async def vcpu_threads(qmp: Qmp) -> tuple[int, ...]:
    """Give the kernel's numbers of the vCPUs' threads."""
    cpus = await qmp.execute("query-cpus-fast")
    if not isinstance(cpus, list) or not cpus:
        raise QmpFailed("query-cpus-fast", "nonsense", "no vCPU")
    return tuple(_number(cpu, "query-cpus-fast", "thread-id") for cpu in cpus)


async def block_places(qmp: Qmp, spec: QemuSpec) -> list[tuple[str, int, int]]:
    """Give (name, host address, size) of each backend of the spec, in its order.

    Raises:
        QmpFailed: a backend is not among the RAM that the guest sees.
    """
    backends = await qmp.execute("query-memdev")
    sizes = {
        name: _number(backend, "query-memdev", "size")
        for backend in (backends if isinstance(backends, list) else [])
        if isinstance(name := field_of(backend, "id"), str)
    }
    starts: dict[str, int] = {}
    for start, _, name in _REGION.findall(await qmp.human("info mtree -f")):
        starts[name] = min(starts.get(name, 1 << 64), int(start, 16))
    places = []
    for memory in spec.memories:
        if memory.name not in starts or sizes.get(memory.name) != memory.size_bytes:
            raise QmpFailed(
                "info mtree",
                "nonsense",
                f"the guest sees no RAM block {memory.name} of {memory.size_bytes} bytes",
            )
        places.append(
            (memory.name, await _host_address(qmp, memory.name, starts[memory.name]), memory.size_bytes)
        )
    return places


async def _host_address(qmp: Qmp, name: str, guest_address: int) -> int:
    printed = await qmp.human(f"gpa2hva {guest_address:#x}")
    match = _HVA.search(printed)
    if match is None or match[2] != name:
        raise QmpFailed(f"gpa2hva {guest_address:#x}", "nonsense", printed[:200])
    return int(match[3], 16)


async def cpu_of(qmp: Qmp, spec: QemuSpec) -> CpuFacts:
    """Give the features that the first vCPU really has, after all that QEMU and the host took away.

    QEMU says what the model and its features come to, and whether it had to leave any of them out. Only if it had, each
    feature is asked for: 250 questions, 10 ms, or 300 where a busy guest is in the way under TCG.
    """
    path = await _first_vcpu(qmp)
    expansion = await qmp.execute("query-cpu-model-expansion", {"type": "full", "model": _cpu_model(spec)})
    left_out = await qmp.execute("qom-get", {"path": path, "property": "filtered-features"})
    identity = {name: await _property(qmp, path, name) for name in _IDENTITY}
    if isinstance(left_out, list) and left_out and not any(field_of(word, "features") for word in left_out):
        return cpu_of_properties(spec.cpu_model, features_of_expansion(expansion), identity)
    known = features_of_expansion(expansion, only_true=False)
    # What a CPU object does not have is a property of the model alone.
    features = [name for name in sorted(known) if await _property(qmp, path, name) is True]
    return cpu_of_properties(spec.cpu_model, tuple(features), identity)


def cpu_of_properties(
    model: str, features: tuple[str, ...], properties: Json, *, is_host_dependent: bool = False
) -> CpuFacts:
    """Give a CPU of these features with what its properties say that CPUID tells of it; what they lack is unknown."""
    vendor = field_of(properties, "vendor")
    return CpuFacts(
        model=model,
        features=features,
        vendor=vendor if isinstance(vendor, str) and len(vendor) <= _VENDOR_CHARS else "",
        family=_number_or_0(field_of(properties, "family"), _MAX_REGISTER),
        number=_number_or_0(field_of(properties, "model"), _MAX_REGISTER),
        stepping=_number_or_0(field_of(properties, "stepping"), _MAX_REGISTER),
        level=_number_or_0(field_of(properties, "level"), _MAX_REGISTER),
        xlevel=_number_or_0(field_of(properties, "xlevel"), _MAX_REGISTER),
        is_host_dependent=is_host_dependent,
    )


async def tsc_khz_of(qmp: Qmp) -> int:
    """Give the rate of the guest's time stamp counter; 0 where QEMU does not know it, as without KVM."""
    hertz = await _property(qmp, await _first_vcpu(qmp), "tsc-frequency")
    return _number_or_0(hertz, _MAX_HERTZ) // 1000


async def version_of(qmp: Qmp) -> str:
    """Give QEMU's own version; a stable release has three numbers."""
    version = await qmp.execute("query-version")
    return ".".join(str(field_of(version, "qemu", part)) for part in ("major", "minor", "micro"))[
        :_VERSION_CHARS
    ]


async def _first_vcpu(qmp: Qmp) -> str:
    return _text(await qmp.execute("query-cpus-fast"), "query-cpus-fast", 0, "qom-path")


async def _property(qmp: Qmp, path: str, name: str) -> Json:
    try:
        return await qmp.execute("qom-get", {"path": path, "property": name})
    except QmpFailed:
        return None


def changes_of(spec: QemuSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give the features that a spec adds to its model, and those that it takes away."""
    changes = spec.cpu.split(",")[1:]
    added, removed = (canonical_all(one[1:] for one in changes if one[0] == sign) for sign in "+-")
    return added, removed


def _cpu_model(spec: QemuSpec) -> dict[str, object]:
    """Give a spec's CPU as QMP takes it: the model, and each +feature and -feature of it."""
    model, *changes = spec.cpu.split(",")
    return {"name": model, "props": {change[1:]: change[0] == "+" for change in changes}}


def features_of_expansion(expansion: Json, *, only_true: bool = True) -> tuple[str, ...]:
    """Give the names of the CPU features in the answer to query-cpu-model-expansion."""
    properties = field_of(expansion, "model", "props")
    if not isinstance(properties, dict):
        raise QmpFailed("query-cpu-model-expansion", "nonsense", "no properties")
    return canonical_all(
        name
        for name, value in properties.items()
        if name not in _NO_FEATURES and (value is True or (value is False and not only_true))
    )


async def blockers_of(qmp: Qmp) -> tuple[str, ...]:
    """Give QEMU's own reasons why this guest cannot be migrated; and running jobs on its disks."""
    reasons = field_of(await qmp.execute("query-migrate"), "blocked-reasons")
    blockers = [str(reason)[:300] for reason in reasons] if isinstance(reasons, list) else []
    jobs = await qmp.execute("query-block-jobs")
    blockers += [
        f"the block job {field_of(job, 'device')} ({field_of(job, 'type')}) runs: let it end first"
        for job in (jobs if isinstance(jobs, list) else [])
    ]
    return tuple(blockers)


async def balloon_of(qmp: Qmp) -> int | None:
    """Give how much RAM the guest's balloon leaves it; None where QEMU cannot say."""
    with contextlib.suppress(QmpFailed):
        return _number(await qmp.execute("query-balloon"), "query-balloon", "actual")
    return None


async def is_confidential(qmp: Qmp) -> bool:
    """Tell whether the CPU encrypts the guest's RAM: SEV, TDX and all others are one link of the machine's."""
    try:
        link = await qmp.execute("qom-get", {"path": "/machine", "property": "confidential-guest-support"})
    except QmpFailed:
        return False  # a machine type that has no such thing
    return isinstance(link, str) and link != ""


def _text(value: Json, command: str, *path: str | int) -> str:
    found = field_of(value, *path)
    if not isinstance(found, str):
        raise QmpFailed(command, "nonsense", f"no {path[-1]} in the answer")
    return found


def _number(value: Json, command: str, *path: str | int) -> int:
    found = field_of(value, *path)
    if not isinstance(found, int) or isinstance(found, bool):
        raise QmpFailed(command, "nonsense", f"no {path[-1]} in the answer")
    return found


def _number_or_0(value: Json, most: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else 0
