"""What this host's QEMU can give to a guest: CPU models with their features, machine and device types.

Law: asks a QEMU of its own, one without a machine, once for each accelerator and binary; nothing is guessed from
/proc/cpuinfo. The answer is kept until the binary changes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from agents.hypervisors.kvm import KvmCpu
from agents.hypervisors.qemu.describe import cpu_of_properties, features_of_expansion, version_of
from agents.hypervisors.qemu.errors import QemuError, QemuGone, QmpFailed
from agents.hypervisors.qemu.qmp import Qmp, field_of
from agents.hypervisors.qemu.spec import Accel
from migrate.cpunames import canonical_all
from migrate.facts import CpuFacts, HostCpuFacts

__all__ = ["HostModels", "ModelCatalog"]

# Half a second of CPU; a host that has none to spare takes long for it.
START_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.02
_MAX_WORDS_BYTES: Final = 2000
# What QEMU says in place of features where a model needs another accelerator, or cannot be made.
_CANNOT_RUN: Final = frozenset({"kvm", "type"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HostModels:
    """`cpus` are what the models come to here: without the features that they have elsewhere and this host lacks.

    `features` is everything that QEMU can give at all; `own` the host's own CPU, which only KVM can give. `deprecated`
    machines are among `machines`.
    """

    cpus: tuple[CpuFacts, ...]
    features: tuple[str, ...]
    own: CpuFacts | None
    machines: tuple[str, ...]
    version: str
    deprecated: tuple[str, ...] = ()
    device_types: frozenset[str] = frozenset()

    def cpu_host(self, kvm: KvmCpu | None) -> HostCpuFacts:
        """Give what the host has besides; `kvm` is what KVM says of it, None where its own CPU runs no guests."""
        if kvm is None:
            return HostCpuFacts(version=self.version, features=self.features)
        own = self.own or CpuFacts(model="", features=())
        return HostCpuFacts(
            is_native=True,
            version=self.version,
            features=self.features,
            vendor=kvm.vendor or own.vendor,
            family=kvm.family or own.family,
            number=kvm.number or own.number,
            tsc_khz=kvm.tsc_khz,
            has_tsc_scaling=kvm.has_tsc_scaling,
        )


class ModelCatalog:
    """Remembers what each accelerator gives; `untold` is why it is not known of one, when it was asked last."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self.untold: dict[Accel, str] = {}
        self._known: dict[tuple[Accel, float], HostModels] = {}
        self._asking = anyio.Lock()

    async def of(self, accel: Accel) -> HostModels:
        """Give what QEMU can do with this accelerator here; the first time takes half a second.

        Raises:
            QemuGone: the binary is missing, or the accelerator does not work here.
            QmpFailed: it answers nonsense.
        """
        try:
            key = accel, os.stat(self._binary).st_mtime
        except OSError as exc:
            raise QemuGone(f"{self._binary} is missing: install QEMU, or set [guests.qemu] binary") from exc
        async with self._asking:
            if key not in self._known:
                try:
                    self._known[key] = await self._ask(accel)
                except QemuError as exc:
                    self.untold[accel] = str(exc)
                    raise
                self.untold.pop(accel, None)
            return self._known[key]

    async def _ask(self, accel: Accel) -> HostModels:
        with tempfile.TemporaryDirectory(prefix="vmferry-") as folder:
            socket = Path(folder, "qmp")
            command = [
                str(self._binary),
                "-machine",
                f"none,accel={accel}",
                "-nodefaults",
                "-display",
                "none",
            ]
            command += ["-qmp", f"unix:{socket},server=on,wait=off", "-no-user-config"]
            async with await anyio.open_process(command, stdin=None, stdout=None) as process:
                try:
                    with anyio.fail_after(START_TIMEOUT_S):
                        return await self._interview(process, socket)
                except TimeoutError as exc:
                    raise QemuGone(
                        f"{self._binary} did not say within {START_TIMEOUT_S:g} s what it can do with {accel}"
                    ) from exc
                finally:
                    if process.returncode is None:
                        process.kill()

    async def _interview(self, process: anyio.abc.Process, socket: Path) -> HostModels:
        while (qmp := await _connected(socket)) is None:
            if process.returncode is not None:
                words = b""
                if process.stderr is not None:
                    words = await process.stderr.receive(_MAX_WORDS_BYTES)
                raise QemuGone(f"{self._binary} does not start: {words.decode(errors='replace').strip()}")
            await anyio.sleep(POLL_S)
        try:
            machines, cpus = await self._machines(qmp), await self._cpus(qmp)
            return HostModels(
                cpus=cpus,
                features=await self._features(qmp, cpus),
                own=next((cpu for cpu in cpus if cpu.model == "host"), None),
                machines=tuple(sorted(machines)),
                version=await version_of(qmp),
                deprecated=tuple(sorted(name for name, is_deprecated in machines.items() if is_deprecated)),
                device_types=await self._device_types(qmp),
            )
        finally:
            await qmp.aclose()

    async def _cpus(self, qmp: Qmp) -> tuple[CpuFacts, ...]:
        definitions = await qmp.execute("query-cpu-definitions")
        cpus = []
        for definition in definitions if isinstance(definitions, list) else []:
            name = field_of(definition, "name")
            if not isinstance(name, str):
                continue
            try:
                expansion = await qmp.execute(
                    "query-cpu-model-expansion", {"type": "full", "model": {"name": name}}
                )
            except QmpFailed:
                continue  # a model that this QEMU does not make
            # An expansion says what the model is, not what of it this host has: that stands with its definition.
            lacking = field_of(definition, "unavailable-features")
            lacks = (
                set(canonical_all(one for one in lacking if isinstance(one, str)))
                if isinstance(lacking, list)
                else ()
            )
            if _CANNOT_RUN & set(lacks):
                continue  # such as `host` without KVM
            features = tuple(one for one in features_of_expansion(expansion) if one not in lacks)
            cpus.append(
                cpu_of_properties(
                    name,
                    features,
                    field_of(expansion, "model", "props"),
                    is_host_dependent=field_of(definition, "migration-safe") is False,
                )
            )
        if not cpus:
            raise QmpFailed("query-cpu-definitions", "nonsense", "no CPU model")
        return tuple(sorted(cpus, key=lambda cpu: cpu.model))

    async def _features(self, qmp: Qmp, cpus: tuple[CpuFacts, ...]) -> tuple[str, ...]:
        """`max` is everything; what QEMU leaves out of it because it would tie a guest to its host, is asked for."""
        known = {feature for cpu in cpus for feature in cpu.features}
        with contextlib.suppress(QmpFailed):
            expansion = await qmp.execute(
                "query-cpu-model-expansion",
                {"type": "full", "model": {"name": "max", "props": {"migratable": False}}},
            )
            known.update(features_of_expansion(expansion))
        return tuple(sorted(known))

    async def _machines(self, qmp: Qmp) -> dict[str, bool]:
        """Give the versioned types of a PC, and whether each is deprecated."""
        machines = await qmp.execute("query-machines")
        return {
            name: field_of(machine, "deprecated") is True
            for machine in (machines if isinstance(machines, list) else [])
            if isinstance(name := field_of(machine, "name"), str) and name.startswith("pc-")
        }

    async def _device_types(self, qmp: Qmp) -> frozenset[str]:
        types = await qmp.execute("qom-list-types", {"implements": "device", "abstract": False})
        names = [field_of(one, "name") for one in (types if isinstance(types, list) else [])]
        return frozenset(name for name in names if isinstance(name, str))


async def _connected(socket: Path) -> Qmp | None:
    """Connect to a QEMU that starts; None while it does not listen. Its socket is there a moment before it listens."""
    if not await anyio.Path(socket).exists():
        return None
    try:
        return await Qmp.connect(socket)
    except QemuGone:
        return None
