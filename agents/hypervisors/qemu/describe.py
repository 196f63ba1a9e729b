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
from migrate.facts import CpuFacts

__all__ = [
    "balloon_of",
    "block_places",
    "blockers_of",
    "cpu_of",
    "features_of_expansion",
    "is_confidential",
    "machine_of",
    "run_state",
    "vcpu_threads",
]

_HVA: Final = re.compile(r"Host virtual address for (0x[0-9a-f]+) \(([^)]*)\) is (0x[0-9a-f]+)")
_REGION: Final = re.compile(r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio \d+, ram\): (\S+)", re.MULTILINE)
# Properties of a CPU object that are no features of the CPU.
_NO_FEATURES: Final = frozenset(
    {
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
    cpus = await qmp.execute("query-cpus-fast")
    path = _text(cpus, "query-cpus-fast", 0, "qom-path")
    expansion = await qmp.execute("query-cpu-model-expansion", {"type": "full", "model": _cpu_model(spec)})
    left_out = await qmp.execute("qom-get", {"path": path, "property": "filtered-features"})
    if isinstance(left_out, list) and left_out and not any(field_of(word, "features") for word in left_out):
        return CpuFacts(model=spec.cpu_model, features=features_of_expansion(expansion))
    known = features_of_expansion(expansion, only_true=False)
    features = []
    for name in sorted(known):
        try:
            has_it = await qmp.execute("qom-get", {"path": path, "property": name})
        except QmpFailed:
            continue  # a property of the model that this CPU object does not have
        if has_it is True:
            features.append(name)
    return CpuFacts(model=spec.cpu_model, features=tuple(features))


def _cpu_model(spec: QemuSpec) -> dict[str, object]:
    """Give a spec's CPU as QMP takes it: the model, and each +feature and -feature of it."""
    model, *changes = spec.cpu.split(",")
    return {"name": model, "props": {change[1:]: change[0] == "+" for change in changes}}


def features_of_expansion(expansion: Json, *, only_true: bool = True) -> tuple[str, ...]:
    """Give the names of the CPU features in the answer to query-cpu-model-expansion."""
    properties = field_of(expansion, "model", "props")
    if not isinstance(properties, dict):
        raise QmpFailed("query-cpu-model-expansion", "nonsense", "no properties")
    return tuple(
        sorted(
            name
            for name, value in properties.items()
            if name not in _NO_FEATURES and (value is True or (value is False and not only_true))
        )
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
