"""The devices of a running QEMU, and what ties each of them to its host.

Law: asks by QMP and gives frozen facts; judges nothing (`migrate.preflight.hardware` does). A guest's devices are
counted with a limit: whoever started it chose their names and how many there are.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import anyio.to_thread

from agents.hypervisors.qemu.cmdline import device_arguments
from agents.hypervisors.qemu.errors import QmpFailed
from agents.hypervisors.qemu.qmp import Json, Qmp, field_of
from agents.hypervisors.qemu.spec import QemuSpec
from migrate.facts import MAX_DEVICES, DeviceFacts, DeviceKind

__all__ = [
    "MAX_NAME_CHARS",
    "devices_of",
    "kind_of",
    "memory_nodes_of",
    "passed_through",
    "unplanned",
]

# Of an identity that somebody chose; QEMU has no limit of its own.
MAX_NAME_CHARS: Final = 64
# The first prefix that fits.
_KINDS: Final = (
    ("vfio", DeviceKind.PASSTHROUGH),
    ("usb-host", DeviceKind.PASSTHROUGH),
    ("scsi-generic", DeviceKind.PASSTHROUGH),
    ("scsi-block", DeviceKind.PASSTHROUGH),
    ("ccid-card-passthru", DeviceKind.PASSTHROUGH),
    ("u2f-passthru", DeviceKind.PASSTHROUGH),
    ("vhost-user-fs", DeviceKind.VIRTIOFS),
    ("virtio-9p", DeviceKind.VIRTIOFS),
    # Writes of a process or a kernel thread with a mapping of its own: no dirty log of QEMU's process has those.
    ("vhost-user", DeviceKind.VHOST_USER),
    ("vhost-", DeviceKind.VHOST),
    ("ivshmem", DeviceKind.SHARED_MEMORY),
    ("tpm-", DeviceKind.TPM),
    ("nvdimm", DeviceKind.PERSISTENT_MEMORY),
    ("virtio-pmem", DeviceKind.PERSISTENT_MEMORY),
    ("cxl-type3", DeviceKind.PERSISTENT_MEMORY),
)
# Properties that say what of the host a device holds.
_TIES: Final = {
    "vfio": ("host", "sysfsdev"),
    "usb-host": ("vendorid", "productid", "hostdevice"),
    "scsi-generic": ("drive",),
    "scsi-block": ("drive",),
    "vhost-user": ("chardev",),
    "ivshmem": ("memdev", "chardev"),
    "tpm-": ("tpmdev",),
    "nvdimm": ("memdev",),
    "virtio-pmem": ("memdev",),
}
_PCI_ADDRESS: Final = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_SYS: Final = Path("/sys")
_FOLDERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")


def kind_of(device_type: str) -> DeviceKind:
    """Give what ties devices of a type to their host."""
    return next((kind for prefix, kind in _KINDS if device_type.startswith(prefix)), DeviceKind.EMULATED)


async def devices_of(qmp: Qmp) -> tuple[tuple[DeviceFacts, ...], int]:
    """Give the devices that were named or plugged in, MAX_DEVICES at most, and how many more there are."""
    found: list[DeviceFacts] = []
    more = 0
    for folder in _FOLDERS:
        children = await qmp.execute("qom-list", {"path": folder})
        for child in children if isinstance(children, list) else []:
            name, kind_word = str(field_of(child, "name")), str(field_of(child, "type"))
            if not kind_word.startswith("child<"):
                continue  # a property of the folder itself
            if len(found) == MAX_DEVICES:
                more += 1
                continue
            device_type = kind_word.removeprefix("child<").removesuffix(">")[:MAX_NAME_CHARS]
            kind = kind_of(device_type)
            tie = "" if kind is DeviceKind.EMULATED else await _tie(qmp, f"{folder}/{name}", device_type)
            found.append(DeviceFacts(name=name[:MAX_NAME_CHARS], type=device_type, kind=kind.value, tie=tie))
    for node in await _nvme_nodes(qmp):
        if len(found) < MAX_DEVICES:
            found.append(node)
        else:
            more += 1
    return tuple(found), more


async def _nvme_nodes(qmp: Qmp) -> list[DeviceFacts]:
    nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
    return [
        DeviceFacts(
            name=f"disk {field_of(node, 'node-name')}"[:MAX_NAME_CHARS],
            type="",
            kind=DeviceKind.PASSTHROUGH.value,
            tie="nvme://: its controller writes to the guest's RAM by itself",
        )
        for node in (nodes if isinstance(nodes, list) else [])
        if field_of(node, "drv") == "nvme"
    ]


async def _tie(qmp: Qmp, path: str, device_type: str) -> str:
    """Give what of the host a device holds, where it says so."""
    said = {}
    for name in next((names for prefix, names in _TIES.items() if device_type.startswith(prefix)), ()):
        with contextlib.suppress(QmpFailed):  # not every release has every property
            said[name] = await qmp.execute("qom-get", {"path": path, "property": name})
    if device_type.startswith("vfio"):
        host, sysfs = str(said.get("host") or ""), str(said.get("sysfsdev") or "")
        return await anyio.to_thread.run_sync(passed_through, host, sysfs)
    words = ", ".join(f"{name} {value}" for name, value in said.items() if value not in (None, "", 0))
    if device_type.startswith("tpm-"):
        words = await _tpm(qmp) or words
    return words[:MAX_NAME_CHARS]


async def _tpm(qmp: Qmp) -> str:
    """A chip of the host, or the process swtpm, whose directory is on the host."""
    tpms = await qmp.execute("query-tpm")
    back_ends = {str(field_of(tpm, "options", "type")) for tpm in (tpms if isinstance(tpms, list) else [])}
    named = {"passthrough": "the TPM chip of its host", "emulator": "swtpm, whose state is its host's"}
    return ", ".join(named.get(one, one) for one in sorted(back_ends))


def passed_through(host: str, sysfs: str, sys: Path = _SYS) -> str:
    """Name a VFIO device: `host` is its PCI address, `sysfs` its directory; either may be empty. Reads /sys."""
    name = Path(sysfs).name or host
    if not re.fullmatch(r"[0-9A-Za-z:.-]{1,64}", name):
        return ""
    if (sys / "bus/mdev/devices" / name).exists():
        return f"mediated device {name}"
    if not _PCI_ADDRESS.fullmatch(name):
        return name
    if (sys / "bus/pci/devices" / name / "physfn").exists():
        return f"SR-IOV virtual function {name}"
    return f"PCI device {name}"


async def memory_nodes_of(qmp: Qmp) -> tuple[int, ...]:
    """Give the NUMA nodes of the host that RAM is bound to; a preference is no binding."""
    return tuple(sorted(set(_bound_nodes(await qmp.execute("query-memdev")))))


def _bound_nodes(backends: Json) -> Iterator[int]:
    for backend in backends if isinstance(backends, list) else []:
        nodes = field_of(backend, "host-nodes")
        if field_of(backend, "policy") in ("bind", "interleave") and isinstance(nodes, list):
            yield from (node for node in nodes if isinstance(node, int) and 0 <= node < 1024)


def unplanned(spec: QemuSpec, devices: Iterable[DeviceFacts]) -> Iterator[str]:
    """Say, a sentence each, which devices were plugged in or out since the guest was started: no spec has that."""
    planned = Counter(
        value.partition(",")[0]
        for option, value in _pairs(list(device_arguments(spec)))
        if option == "-device"
    )
    seen = Counter(device.type for device in devices if device.type)
    for device_type, count in (seen - planned).items():
        names = ", ".join(device.name for device in devices if device.type == device_type)
        yield (
            f"{count} {device_type} more than it was started with ({names[:200]}): unplug what was plugged in, a "
            "destination would not have it"
        )
    for device_type, count in (planned - seen).items():
        yield (
            f"{count} {device_type} less than it was started with: plug in again what was unplugged, a destination "
            "would have it"
        )


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    yield from zip(words[::2], words[1::2], strict=True)
