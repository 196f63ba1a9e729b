"""The driver: QEMU guests of one directory as `migrate.ports.Hypervisor` sees them.

Law: AnyIO only. A guest is found by its QMP socket, known by its UUID, and described by the command line that its
process was started with, whoever started it. A monitor serves one client at a time: the driver connects for a moment,
or holds the guest for a migration and answers from what it knows.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents.hypervisors.confinement import ROOT, confinement_of
from agents.hypervisors.hostmemory import free_memory_bytes, memory_nodes
from agents.hypervisors.inhabitants import Inhabitant
from agents.hypervisors.kvm import KvmCpu, kvm_cpu
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.describe import (
    balloon_of,
    blockers_of,
    changes_of,
    cpu_of,
    is_confidential,
    machine_of,
    run_state,
    tsc_khz_of,
    vcpu_threads,
    version_of,
)
from agents.hypervisors.qemu.errors import QemuError, QemuGone, QmpFailed, SpecInvalid
from agents.hypervisors.qemu.found import Found, connected, interview, remove_if_dead
from agents.hypervisors.qemu.guest import Hold, hold
from agents.hypervisors.qemu.guestfacts import (
    blocks_of,
    facts_of,
    facts_of_undescribed,
    huge_bytes_of,
)
from agents.hypervisors.qemu.hardware import devices_of, memory_nodes_of, unplanned
from agents.hypervisors.qemu.hostmodels import HostModels, ModelCatalog
from agents.hypervisors.qemu.incoming import QemuIncomingGuest
from agents.hypervisors.qemu.launch import UNUSED_CLOSES_WITHIN_S, Process, end, launch
from agents.hypervisors.qemu.observe import (
    observed_cpu,
    observed_disks,
    observed_ram,
    own_firmware,
)
from agents.hypervisors.qemu.qmp import QMP_TIMEOUT_S, Qmp
from agents.hypervisors.qemu.romfiles import RomShelf
from agents.hypervisors.qemu.rundir import QemuPaths, monitors
from agents.hypervisors.qemu.running import QemuRunningGuest
from agents.hypervisors.qemu.spec import KIND, Accel, QemuSpec
from agents.hypervisors.seen import Seen
from memory.errors import RamError
from migrate.errors import GuestBusy, GuestRefused, GuestUnknown
from migrate.facts import (
    MAX_DEVICES,
    CpuFacts,
    FirmwareFacts,
    GuestCpuFacts,
    GuestDemand,
    GuestFacts,
    GuestHardware,
    HostCpuFacts,
    HostFacts,
    HostHardware,
    Objection,
)
from migrate.ports import SeenGuest
from migrate.preflight.cpufit import models_with

__all__ = ["QemuHypervisor"]

# Guests that are described at once: each is a connection and a dozen questions.
_DESCRIBED_AT_ONCE: Final = 8
# A monitor that another client holds is not waited for when guests are listed.
_LIST_TIMEOUT_S: Final = 2.0
# A preflight asks for facts and for inhabitants one after the other: the guests are asked once for both.
_FOUND_HOLDS_S: Final = 2.0
# Which models this host has besides is half a second's question, once; a machine that is very busy takes some seconds.
_ADVICE_S: Final = 10.0


class QemuHypervisor:
    """The QEMU guests of one host."""

    name: Final = KIND

    def __init__(self, host: QemuHost, host_name: str, *, root: Path = ROOT) -> None:
        """`root` is where what confines a guest is looked for in /proc and /sys."""
        self._host = replace(host, dir=host.dir.absolute())
        self._host_name = host_name
        self._root = root
        self._catalog = ModelCatalog(host.binary)
        self._roms = RomShelf(host.binary, host.shared_dirs)
        self._cpus: dict[int, tuple[CpuFacts, GuestCpuFacts]] = {}
        self._kvm: KvmCpu | None = None
        self._held: dict[Path, Found] = {}
        self._found: tuple[float, list[Found]] = (-math.inf, [])

    async def host_facts(self, guest: GuestFacts | None = None) -> HostFacts:
        """Give what this host can give to one more guest, with that guest's accelerator."""
        accel, models = await self._models(guest)
        here = await self._find_all()
        free_bytes = await anyio.to_thread.run_sync(self._free_memory_bytes, here)
        return HostFacts(
            name=self._host_name,
            hypervisor=KIND,
            cpus=models.cpus if models else (),
            machines=models.machines if models else (),
            free_memory_bytes=free_bytes + huge_bytes_of(guest),
            guest_ids=tuple(one.guest_id for one in here if not one.is_incoming),
            hardware=await self._hardware_here(guest, models, here),
            cpu_host=models.cpu_host(await self._kvm_of(accel)) if models else HostCpuFacts(),
        )

    async def objections(self, facts: GuestFacts) -> tuple[Objection, ...]:
        """Give everything that this host has against such a guest."""
        if facts.hypervisor != KIND or not facts.is_described:
            return ()
        try:
            spec = QemuSpec.from_bytes(facts.spec)
        except SpecInvalid as exc:
            return tuple(Objection(check="guest-spec", found=one, remedy="") for one in exc.problems)
        is_here = any(held.guest_id == spec.guest_id for held in self._held.values())
        found = await anyio.to_thread.run_sync(lambda: list(self._host.objections(spec, has_memory=is_here)))
        untold = self._catalog.untold.get(spec.accel)
        if untold is not None and not any(one.check in ("accelerator", "hypervisor-binary") for one in found):
            found.append(
                Objection(
                    check="hypervisor-binary", found=untold, remedy="Start QEMU by hand and see what it says"
                )
            )
        return tuple(found)

    async def guests(self) -> list[GuestFacts]:
        """List the guests that are here, also those that no spec describes; machines that wait are none yet."""
        listed = []
        for one in await self._find_all():
            if one.is_incoming:
                continue
            if one.spec is None:
                listed.append(facts_of_undescribed(one))
            else:
                cpu, run = self._cpus.get(one.pid, (CpuFacts(model=one.spec.cpu_model, features=()), None))
                listed.append(facts_of(one.spec, cpu, run, is_running=one.state == "running"))
        return listed

    async def inhabitants(self) -> tuple[Inhabitant, ...]:
        """Give all machines that are here, also those that wait; as they were found a moment ago, if they were.

        One that no spec describes counts as nothing.
        """
        found_at_s, found = self._found
        if anyio.current_time() - found_at_s > _FOUND_HOLDS_S:
            found = await self._find_all()
        return tuple(
            Inhabitant(
                guest_id=one.guest_id,
                ram_bytes=one.spec.ram_bytes if one.spec else 0,
                vcpus=one.spec.vcpus if one.spec else 0,
                pid=one.pid,
            )
            for one in found
        )

    async def open_guest(self, guest_id: str) -> QemuRunningGuest:
        """Take hold of a guest. Raises GuestUnknown, GuestRefused."""
        try:
            found = await self._find(guest_id)
            if found is None or found.is_incoming:
                raise GuestUnknown(f"no QEMU guest {guest_id!r:.60} on {self._host_name}")
            if found.paths.qmp in self._held:
                raise GuestBusy(f"guest {found.name} is held by another migration already")
            if found.spec is None:
                raise GuestRefused(f"the QEMU {found.name} cannot be moved: {'; '.join(found.problems)}")
            return await self._open(found, found.spec)
        except (QemuError, RamError) as exc:
            raise GuestRefused(str(exc)) from exc

    async def inspect_guest(self, guest_id: str) -> SeenGuest:
        """As `open_guest`; one that cannot be opened is described as far as its QEMU tells. Raises GuestUnknown."""
        try:
            return await self.open_guest(guest_id)
        except GuestRefused as exc:
            found = await self._find(guest_id)
            if found is None:
                raise GuestUnknown(f"the QEMU guest {guest_id!r:.60} has ended") from exc
            return Seen(await self._observe(found, str(exc)))

    async def prepare_incoming(self, facts: GuestFacts) -> QemuIncomingGuest:
        """Start an empty machine for this guest. Raises GuestRefused."""
        try:
            spec = QemuSpec.from_bytes(facts.spec)
            if (
                facts.hypervisor != KIND
                or facts.guest_id != spec.guest_id
                or facts.ram_bytes != spec.ram_bytes
            ):
                raise GuestRefused("the guest's facts and its spec do not fit each other; update both agents")
            if facts.blocks != blocks_of(spec):
                raise GuestRefused("the guest's blocks of RAM are not those of its spec; update both agents")
            free_bytes = self._free_memory_bytes(await self._find_all()) + huge_bytes_of(facts)
            if spec.ram_bytes > free_bytes:
                raise GuestRefused(
                    f"{self._host_name} has {free_bytes >> 20} MiB of memory free and the guest needs "
                    f"{spec.ram_bytes >> 20} MiB; move another guest away or choose another host"
                )
            qmp, paths = await launch(spec, self._host, is_incoming=True)
            try:
                held = await hold(qmp, paths, spec, is_filled_here=True)
                guest = QemuIncomingGuest(held)
                await guest.await_state()
                self._keep(await interview(qmp, paths), held)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await _discard(qmp, paths)
                raise
        except (QemuError, RamError) as exc:
            raise GuestRefused(str(exc)) from exc
        return guest

    async def find_incoming(self, guest_id: str) -> QemuIncomingGuest | None:
        """Give the machine of this guest that has not run here yet, after a restart of the agent."""
        try:
            found = await self._find(guest_id)
            if found is None or not found.is_incoming or found.spec is None:
                return None
            qmp = await Qmp.connect(found.paths.qmp)
            try:
                held = await hold(qmp, found.paths, found.spec)
                self._keep(found, held)
                return QemuIncomingGuest(held)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await qmp.aclose()
                raise
        except (QemuError, RamError) as exc:
            raise GuestRefused(str(exc)) from exc

    # ------------------------------------------------------------------ finding

    async def _find_all(self) -> list[Found]:
        found: list[Found] = []
        limiter = anyio.CapacityLimiter(_DESCRIBED_AT_ONCE)

        async def look(monitor: Path) -> None:
            async with limiter:
                if (one := await self._look_at(monitor)) is not None:
                    found.append(one)

        async with anyio.create_task_group() as tasks:
            for monitor in await anyio.to_thread.run_sync(lambda: list(monitors(self._host.dir))):
                tasks.start_soon(look, monitor)
        self._cpus = {one.pid: self._cpus[one.pid] for one in found if one.pid in self._cpus}
        found.sort(key=lambda one: one.guest_id)
        self._found = (anyio.current_time(), found)
        return found

    async def _find(self, guest_id: str) -> Found | None:
        """Look where it was when all were looked for last; only if it is not there any more, look for all."""
        known = next((one for one in self._found[1] if one.guest_id == guest_id), None)
        again = await self._look_at(known.paths.qmp) if known is not None else None
        if again is not None and again.guest_id == guest_id:
            return again
        return next((one for one in await self._find_all() if one.guest_id == guest_id), None)

    async def _look_at(self, monitor: Path) -> Found | None:
        """Ask one QEMU who it is; None for one that has ended or does not answer."""
        if (held := self._held.get(monitor)) is not None:
            # Its monitor is a migration's now: the marker says whether it is a guest of this host already.
            is_incoming = await anyio.to_thread.run_sync(held.paths.incoming.exists)
            return replace(held, state="inmigrate" if is_incoming else "running")
        try:
            async with connected(monitor, timeout_s=_LIST_TIMEOUT_S) as qmp:
                return await interview(qmp, QemuPaths.of_monitor(monitor))
        except QemuError:
            await anyio.to_thread.run_sync(remove_if_dead, monitor)
            return None

    async def _open(self, found: Found, spec: QemuSpec) -> QemuRunningGuest:
        models = await self._models_here(spec.accel)
        qmp = await Qmp.connect(found.paths.qmp)
        try:
            if found.pid not in self._cpus:
                self._cpus[found.pid] = await cpu_of(qmp, spec.cpu), await self._cpu_run(qmp, spec)
            cpu, run = self._cpus[found.pid]
            if models is not None:
                run = replace(run, alternatives=models_with(cpu.features, models.cpus))
            hardware = await self._hardware_of(qmp)
            facts = replace(
                facts_of(spec, cpu, run, is_running=await run_state(qmp) == "running"),
                machine=await machine_of(qmp),
                blockers=(*await blockers_of(qmp), *unplanned(spec, hardware.devices)),
                hardware=hardware,
                demand=GuestDemand(
                    vcpus=spec.vcpus,
                    has_balloon=spec.has_balloon,
                    balloon_bytes=await balloon_of(qmp) if spec.has_balloon else None,
                ),
                confinement=replace(
                    await anyio.to_thread.run_sync(confinement_of, found.pid, self._root),
                    is_confidential=await is_confidential(qmp),
                ),
            )
            threads = await vcpu_threads(qmp)
            held = await hold(qmp, found.paths, spec)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await qmp.aclose()
            raise
        self._keep(found, held)
        return QemuRunningGuest(held, facts, threads)

    async def _observe(self, found: Found, refusal: str) -> GuestFacts:
        """Give what a QEMU says of a guest that cannot be opened; what it does not say is left out."""
        if found.spec is None:
            facts = facts_of_undescribed(found)
        else:
            cpu, run = self._cpus.get(found.pid, (CpuFacts(model=found.spec.cpu_model, features=()), None))
            facts = replace(
                facts_of(found.spec, cpu, run, is_running=found.state == "running"), blockers=(refusal,)
            )
        with contextlib.suppress(QemuGone):
            async with connected(found.paths.qmp, timeout_s=QMP_TIMEOUT_S) as qmp:
                facts = await self._observe_by(qmp, found, facts)
        return facts

    async def _observe_by(self, qmp: Qmp, found: Found, facts: GuestFacts) -> GuestFacts:
        """Add one fact after another; an answer that is nonsense costs that fact alone."""
        with contextlib.suppress(QmpFailed):
            facts = replace(facts, machine=await machine_of(qmp))
        with contextlib.suppress(QmpFailed):
            facts = replace(facts, blockers=(*facts.blockers, *await blockers_of(qmp)))
        with contextlib.suppress(QmpFailed):
            facts = replace(facts, hardware=await self._hardware_of(qmp))
        if found.spec is not None:
            return facts
        with contextlib.suppress(QmpFailed):
            facts = replace(facts, blocks=await observed_ram(qmp))
        with contextlib.suppress(QmpFailed):
            facts = replace(facts, disks=await observed_disks(qmp))
        with contextlib.suppress(QmpFailed):
            if found.pid not in self._cpus:
                self._cpus[found.pid] = await observed_cpu(qmp, found.cpu), GuestCpuFacts()
            facts = replace(facts, cpu=self._cpus[found.pid][0])
        return facts

    async def _hardware_of(self, qmp: Qmp) -> GuestHardware:
        """Ask a running QEMU what its machine is made of."""
        devices, more = await devices_of(qmp)
        firmware = await own_firmware(qmp)
        return GuestHardware(
            version=await version_of(qmp),
            devices=devices,
            more_devices=more,
            memory_nodes=await memory_nodes_of(qmp),
            roms=await self._roms.of_running(qmp),
            firmware=await self._roms.own(firmware.kind, firmware.paths) if firmware else None,
        )

    async def _hardware_here(
        self, guest: GuestFacts | None, models: HostModels | None, here: list[Found]
    ) -> HostHardware:
        """Give what this host has of what such a guest is made of. All of the guest's facts are hostile."""
        wanted = guest.hardware if guest is not None else GuestHardware()
        firmware: FirmwareFacts | None = None
        if wanted.firmware is not None:
            paths = tuple((one.role, one.path) for one in wanted.firmware.files)
            firmware = await self._roms.own(wanted.firmware.kind, paths)
        types = {device.type for device in wanted.devices[:MAX_DEVICES]}
        return HostHardware(
            version=models.version if models else "",
            device_types=tuple(sorted(types & models.device_types)) if models else (),
            deprecated_machines=models.deprecated if models else (),
            memory_nodes=await anyio.to_thread.run_sync(memory_nodes),
            roms=await self._roms.find(rom.name for rom in wanted.roms),
            firmware=firmware,
            guest_names=tuple(
                sorted(one.name for one in here if guest is None or one.guest_id != guest.guest_id)
            ),
        )

    def _keep(self, found: Found, held: Hold) -> None:
        monitor = found.paths.qmp
        self._held[monitor] = found
        held.on_release = lambda: self._held.pop(monitor, None)

    async def _cpu_run(self, qmp: Qmp, spec: QemuSpec) -> GuestCpuFacts:
        added, removed = changes_of(spec)
        kvm = await self._kvm_of(spec.accel)
        return GuestCpuFacts(
            is_native=kvm is not None,
            added=added,
            removed=removed,
            version=await version_of(qmp),
            host_vendor=kvm.vendor if kvm else "",
            tsc_khz=await tsc_khz_of(qmp),
        )

    async def _kvm_of(self, accel: Accel) -> KvmCpu | None:
        """Ask KVM of the host's own CPU, which does not change while an agent runs."""
        if accel is not Accel.KVM:
            return None
        if self._kvm is None:
            self._kvm = await anyio.to_thread.run_sync(kvm_cpu)
        return self._kvm

    async def _models_here(self, accel: Accel) -> HostModels | None:
        """Give what a guest could be started with on this host instead: advice, and not waited for long."""
        with contextlib.suppress(QemuError), anyio.move_on_after(_ADVICE_S):
            return await self._catalog.of(accel)
        return None

    async def _models(self, guest: GuestFacts | None) -> tuple[Accel, HostModels | None]:
        """Give what QEMU can do here with the guest's accelerator, or with the best that works here."""
        accels = self._host.accels
        if guest is not None and guest.hypervisor == KIND:
            with contextlib.suppress(SpecInvalid):
                accels = (QemuSpec.from_bytes(guest.spec).accel,)
        for accel in accels:
            # Why an accelerator does not work is an objection's to say.
            with contextlib.suppress(QemuError):
                return accel, await self._catalog.of(accel)
        return Accel.TCG, None

    def _free_memory_bytes(self, here: list[Found]) -> int:
        free_bytes = free_memory_bytes()
        if self._host.memory_limit_bytes is not None:
            taken_bytes = sum(one.spec.ram_bytes for one in here if one.spec is not None)
            free_bytes = max(min(free_bytes, self._host.memory_limit_bytes - taken_bytes), 0)
        return free_bytes


async def _discard(qmp: Qmp, paths: QemuPaths) -> None:
    """End a machine that was just started and cannot be used."""
    with contextlib.suppress(QemuError):
        process = Process(qmp.peer_pid)
        try:
            await end(qmp, process, paths, closes_within_s=UNUSED_CLOSES_WITHIN_S)
        finally:
            process.close()
            await qmp.aclose()
