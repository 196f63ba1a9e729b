"""A guest's spec, or the little that is known without one, as `migrate.facts`."""

from __future__ import annotations

import os

from agents.hypervisors.qemu.errors import SpecInvalid
from agents.hypervisors.qemu.found import Found
from agents.hypervisors.qemu.spec import KIND, DiskSpec, QemuSpec
from agents.storageproof.urls import is_remote
from migrate.facts import BlockFacts, CpuFacts, DiskFacts, DiskKind, GuestCpuFacts, GuestDemand, GuestFacts

__all__ = ["blocks_of", "facts_of", "facts_of_undescribed", "huge_bytes_of"]


def huge_bytes_of(guest: GuestFacts | None) -> int:
    """Give what of a guest's RAM comes out of reserved huge pages, and not out of free memory."""
    if guest is None or guest.hypervisor != KIND:
        return 0
    try:
        spec = QemuSpec.from_bytes(guest.spec)
    except SpecInvalid:
        return 0
    return sum(memory.size_bytes for memory in spec.memories if memory.page_bytes)


def blocks_of(spec: QemuSpec) -> tuple[BlockFacts, ...]:
    """Give the blocks of RAM that a spec comes to."""
    return tuple(BlockFacts(name=memory.name, size_bytes=memory.size_bytes) for memory in spec.memories)


def facts_of(spec: QemuSpec, cpu: CpuFacts, run: GuestCpuFacts | None, *, is_running: bool) -> GuestFacts:
    """Give what a spec says; what a running QEMU says besides comes on top."""
    return GuestFacts(
        guest_id=spec.guest_id,
        name=spec.name,
        hypervisor=KIND,
        is_running=is_running,
        machine=spec.machine,
        blocks=blocks_of(spec),
        cpu=cpu,
        disks=tuple(_disk(number, disk) for number, disk in enumerate(spec.disks)),
        spec=spec.to_bytes(),
        demand=GuestDemand(vcpus=spec.vcpus, has_balloon=spec.has_balloon),
        cpu_run=run or GuestCpuFacts(),
    )


def facts_of_undescribed(found: Found) -> GuestFacts:
    """Give what is known of a QEMU that somebody else started and that has no spec: enough to say why."""
    return GuestFacts(
        guest_id=found.guest_id,
        name=found.name,
        hypervisor=KIND,
        is_running=found.state == "running",
        machine="",
        blocks=(),
        cpu=CpuFacts(model="", features=()),
        disks=(),
        spec=b"",
        blockers=found.problems,
    )


def _disk(number: int, disk: DiskSpec) -> DiskFacts:
    is_url = is_remote(disk.path)
    try:
        size_bytes = os.stat(disk.path).st_size
    except OSError:
        size_bytes = 0
    return DiskFacts(
        name=f"disk{number}",
        path=disk.path,
        size_bytes=size_bytes,
        is_read_only=disk.is_read_only,
        kind=DiskKind.NETWORK if is_url else DiskKind.FILE,
        format=disk.format.value,
        cache=disk.cache.value,
        is_locked=not is_url and not disk.is_read_only,
    )
