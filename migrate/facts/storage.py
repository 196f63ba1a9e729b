"""Disks: what a driver says of them, and what an end sees at their paths."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BackingFacts", "DiskFacts", "DiskKind", "ImageFacts"]


class DiskKind(StrEnum):
    """What a guest's disk is to its hypervisor. `FILE` is a path: of a file, or of a block device."""

    FILE = "file"
    NETWORK = "network"
    CDROM = "cdrom"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """One disk of a guest. `path` is the path on the host that the facts come from, or a network disk's URL.

    `format` is what the hypervisor was told that is in it, `cache` how the host caches it, as QEMU spells both; empty
    where a driver has no such thing. `is_locked`: the guest's own process holds QEMU's lock to write it.
    """

    name: str
    path: str
    size_bytes: int
    is_read_only: bool
    kind: DiskKind = DiskKind.FILE
    format: str = ""
    cache: str = ""
    is_locked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BackingFacts:
    """One image under another. `digest` is of its first sector; `format` is what its header says that it is."""

    path: str
    error: str = ""
    size_bytes: int = 0
    format: str = ""
    digest: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What one end sees at a disk's path. `error` says why it could not be looked at; the rest is empty then.

    `name` is the last part of the path with links resolved. `is_covered`: a mount of its own lies on the file alone.
    `kernel` names the kernel that looked (its boot): two ends of one name are on one machine; `device` is a block
    device's number in that kernel, `identity` what the device says of itself wherever it is attached. `digests` are of
    the sectors that were asked for, empty where one could not be read. `is_direct`: it can be read past the host's
    cache. `write_error` says why it cannot be opened for writing. `writers` counts the processes of this host that hold
    QEMU's lock to write it. `format` is what the header says that it is; `chain` is what lies under it, the nearest
    first, `chain_error` why it is not all of it. `pool` is the type of the storage pool that has it, as that host's
    libvirt spells it; `pool_error` why that could not be asked. Both are empty where nobody is to ask.
    """

    error: str = ""
    name: str = ""
    is_block: bool = False
    is_covered: bool = False
    kernel: str = ""
    device: str = ""
    identity: str = ""
    size_bytes: int = 0
    allocated_bytes: int = 0
    virtual_bytes: int = 0
    digests: tuple[bytes, ...] = ()
    is_direct: bool = False
    write_error: str = ""
    writers: int = 0
    file_system: str = ""
    free_bytes: int = 0
    is_read_only: bool = False
    format: str = ""
    snapshots: int = 0
    chain: tuple[BackingFacts, ...] = ()
    chain_error: str = ""
    pool: str = ""
    pool_error: str = ""
