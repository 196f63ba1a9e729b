"""What a guest's machine is made of beside RAM, CPU and disks, and what a host has of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = [
    "MAX_DEVICES",
    "DeviceFacts",
    "DeviceKind",
    "FileFacts",
    "FirmwareFacts",
    "GuestHardware",
    "HostHardware",
    "RomFacts",
]

# A PC has 32 PCI slots of 8 functions on each of its buses; whoever has more devices than this is not judged whole.
MAX_DEVICES: Final = 512


class DeviceKind(StrEnum):
    """What ties a device to its host. On the wire a plain word: a newer agent may have more of them."""

    EMULATED = "emulated"
    PASSTHROUGH = "passthrough"
    TPM = "tpm"
    VIRTIOFS = "virtiofs"
    VHOST_USER = "vhost-user"
    VHOST = "vhost"
    SHARED_MEMORY = "shared-memory"
    PERSISTENT_MEMORY = "persistent-memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """One device. `type` is the hypervisor's word, empty for what is none of its devices; `tie` is what it holds."""

    name: str
    type: str
    kind: str
    tie: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RomFacts:
    """A firmware image by its file's name: the bytes of guest memory that it takes, and its content where known."""

    name: str
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """A file that firmware lives in. `error` says why nothing more is known."""

    role: str
    path: str
    is_shared: bool = False
    size_bytes: int = 0
    sha256: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirmwareFacts:
    """Firmware of the guest's own: `kind` is bios or uefi, `files` its code and its variables."""

    kind: str
    files: tuple[FileFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestHardware:
    """`version` is that of the hypervisor's process that runs the guest.

    `devices` are MAX_DEVICES at most, and `more_devices` were left out. `memory_nodes` are the NUMA nodes of its host
    that its RAM is bound to.
    """

    version: str = ""
    devices: tuple[DeviceFacts, ...] = ()
    more_devices: int = 0
    memory_nodes: tuple[int, ...] = ()
    roms: tuple[RomFacts, ...] = ()
    firmware: FirmwareFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostHardware:
    """`device_types` are those of the guest's that the hypervisor has here, `roms` those that it would load for them.

    `guest_names` are the names of the other guests here. `firmware` is what was found at the paths of the guest's.
    """

    version: str = ""
    device_types: tuple[str, ...] = ()
    deprecated_machines: tuple[str, ...] = ()
    memory_nodes: tuple[int, ...] = ()
    roms: tuple[RomFacts, ...] = ()
    firmware: FirmwareFacts | None = None
    guest_names: tuple[str, ...] = ()
