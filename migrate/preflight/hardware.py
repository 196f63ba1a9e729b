"""Each device of the guest by what ties it to its host, and whether the destination's hypervisor has its like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from migrate.facts import DeviceKind
from migrate.preflight.evidence import Inspection, named
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "DEVICE_TYPES", "TIED", "judge"]

DEVICE_TYPES: Final = Check(
    check_id="device-types",
    asked="Has the destination's hypervisor every type of device that the guest has?",
    why="The machine there is made of the same devices, and their state fits no others",
    remedy="Install the hypervisor's package that has the device on the destination, or take it away from the guest",
)
PASSTHROUGH: Final = Check(
    check_id="passthrough",
    asked="Is the guest free of devices that belong to its host (PCI, SR-IOV, mediated devices, USB, raw SCSI, NVMe)?",
    why="The state of real hardware stays where the hardware is, and it writes to the guest's RAM by itself",
    remedy="Unplug it from the guest, and give the guest a virtio device in its place",
)
TPM: Final = Check(
    check_id="tpm",
    asked="Is the guest free of a TPM?",
    why="Its keys are in a chip or in the directory of another process; a guest that finds other ones cannot open its "
    "disks any more",
    remedy="Move the guest while it is off together with its TPM's state, or start it without a TPM",
)
VIRTIOFS: Final = Check(
    check_id="virtiofs",
    asked="Is the guest free of directories of its host (virtiofs, 9p)?",
    why="The files that it has open are open in a process of its host, which cannot be copied",
    remedy="Unmount the directory in the guest and unplug the device; share it over the network instead (NFS, SMB)",
)
VHOST_USER: Final = Check(
    check_id="vhost-user",
    asked="Is the guest free of devices that another process runs (vhost-user)?",
    why="That process stays on the host, and writes to the guest's RAM through a mapping of its own, which no log of "
    "the hypervisor's has",
    remedy="Replace it by a device that the hypervisor runs itself",
)
VHOST: Final = Check(
    check_id="vhost",
    asked="Is the guest free of devices that the host's kernel runs (vhost)?",
    why="The kernel writes to the guest's RAM from a thread of its own, and nothing has proved that those writes are "
    "seen",
    remedy="Start the guest without it: vhost=off for a network, no vhost-vsock, no vhost-scsi",
)
SHARED_MEMORY: Final = Check(
    check_id="shared-memory",
    asked="Is the guest free of memory that it shares with others (ivshmem)?",
    why="Other guests write to it while it is copied, and go on writing where the guest is no more",
    remedy="Unplug it; let the guests talk over a network",
)
PERSISTENT_MEMORY: Final = Check(
    check_id="persistent-memory",
    asked="Is the guest free of persistent memory (NVDIMM, virtio-pmem)?",
    why="It is a file of its host that is mapped into the guest: neither a disk nor RAM that is copied",
    remedy="Put its data on a disk of the shared storage",
)
# What a kind of device gets its finding from. Those that are not here are free to go.
TIED: Final[Mapping[str, Check]] = MappingProxyType(
    {
        DeviceKind.PASSTHROUGH: PASSTHROUGH,
        DeviceKind.TPM: TPM,
        DeviceKind.VIRTIOFS: VIRTIOFS,
        DeviceKind.VHOST_USER: VHOST_USER,
        DeviceKind.VHOST: VHOST,
        DeviceKind.SHARED_MEMORY: SHARED_MEMORY,
        DeviceKind.PERSISTENT_MEMORY: PERSISTENT_MEMORY,
    }
)
CHECKS: Final = (DEVICE_TYPES, *TIED.values())


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge each device of the guest."""
    guest = inspection.guest
    if guest.hypervisor == inspection.host.hypervisor:
        yield from _types(inspection)
    for kind, check in TIED.items():
        tied = [device for device in guest.hardware.devices if device.kind == kind]
        for device in tied:
            what = (
                f"{device.type} ({device.tie})" if device.type and device.tie else device.type or device.tie
            )
            yield check.refused(
                f"{guest.name} has the device {device.name}, {what or kind}, on {inspection.source_host}"
            )
        if not tied:
            yield check.ok(f"{guest.name} has none")


def _types(inspection: Inspection) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    if guest.hardware.more_devices:
        yield DEVICE_TYPES.refused(
            f"{guest.name} has {guest.hardware.more_devices} devices more than can be judged"
        )
    wanted = sorted({device.type for device in guest.hardware.devices if device.type})
    if wanted and not host.hardware.version:
        yield DEVICE_TYPES.unknown(
            f"{host.name} does not say which devices its hypervisor has; {guest.name} has {named(wanted)}"
        )
        return
    missing = [one for one in wanted if one not in host.hardware.device_types]
    for one in missing:
        names = [device.name for device in guest.hardware.devices if device.type == one]
        yield DEVICE_TYPES.refused(
            f"{guest.name} has the device {named(names)} of type {one}, which the hypervisor of {host.name} "
            f"({host.hardware.version:.40}) does not have"
        )
    if not missing and not guest.hardware.more_devices:
        yield DEVICE_TYPES.ok(f"{host.name} has all {len(wanted)} types of {guest.name}'s devices")
