"""What a running QEMU says of a guest that no spec describes: enough for every check that needs no spec.

Law: asks by QMP, changes nothing. What cannot be had is left out: the checks say `unknown`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import anyio.to_thread

from agents.hypervisors.qemu.describe import cpu_of, features_of_expansion
from agents.hypervisors.qemu.errors import QmpFailed
from agents.hypervisors.qemu.netdisks import url_of_filename
from agents.hypervisors.qemu.qmp import Json, Qmp, field_of
from agents.hypervisors.qemu.spec import Cache, is_cpu
from migrate.facts import BlockFacts, CpuFacts, DiskFacts, DiskKind

__all__ = [
    "MAX_DISKS",
    "OwnFirmware",
    "cpu_argument",
    "observed_cpu",
    "observed_disks",
    "observed_ram",
    "own_firmware",
]

# As many as a spec may have; the guest cannot be moved anyway.
MAX_DISKS: Final = 64
# PATH_MAX of Linux; a URL may be cut.
_MAX_PATH_CHARS: Final = 4096
# What a message can carry.
_MAX_BYTES: Final = (1 << 63) - 1
_CPU_SUFFIX: Final = "-x86_64-cpu"
# Where QEMU puts UEFI: its code, its variables.
_FLASHES: Final = ("/machine/system.flash0", "/machine/system.flash1")


def cpu_argument(argv: Sequence[str]) -> str:
    """Give what stands behind the last -cpu; empty where it is more than a model and features of it."""
    words = [value for option, value in pairwise(argv) if option in ("-cpu", "--cpu")]
    return words[-1] if words and is_cpu(words[-1]) else ""


async def observed_cpu(qmp: Qmp, argument: str) -> CpuFacts:
    """Give the CPU that the guest was started with; without an argument that says it, its model and each feature.

    The latter are 250 questions: 10 ms, or a second where a host is busy.
    """
    if argument:
        return await cpu_of(qmp, argument)
    path = field_of(await qmp.execute("query-cpus-fast"), 0, "qom-path")
    kind = await qmp.execute("qom-get", {"path": str(path), "property": "type"})
    if not isinstance(kind, str) or not kind.endswith(_CPU_SUFFIX):
        raise QmpFailed("qom-get type", "nonsense", f"{kind!r:.80} is no CPU")
    model = kind.removesuffix(_CPU_SUFFIX)
    expansion = await qmp.execute("query-cpu-model-expansion", {"type": "full", "model": {"name": model}})
    features = []
    for name in features_of_expansion(expansion, only_true=False):
        with contextlib.suppress(QmpFailed):  # a property of the model that this CPU object does not have
            if await qmp.execute("qom-get", {"path": str(path), "property": name}) is True:
                features.append(name)
    return CpuFacts(model=model, features=tuple(features))


async def observed_ram(qmp: Qmp) -> tuple[BlockFacts, ...]:
    """Give all RAM as one block."""
    summary = await qmp.execute("query-memory-size-summary")
    sizes = [field_of(summary, "base-memory"), field_of(summary, "plugged-memory")]
    total = sum(size for size in sizes if isinstance(size, int) and not isinstance(size, bool))
    return (BlockFacts(name="ram", size_bytes=min(max(total, 0), _MAX_BYTES)),)


async def observed_disks(qmp: Qmp) -> tuple[DiskFacts, ...]:
    """Give the guest's disks, numbered as QEMU lists them."""
    disks: list[DiskFacts] = []
    blocks = await qmp.execute("query-block")
    for number, block in enumerate(blocks if isinstance(blocks, list) else []):
        if str(field_of(block, "qdev")) not in _FLASHES and len(disks) < MAX_DISKS:
            disks.append(await anyio.to_thread.run_sync(_disk, f"disk{number}", block))
    return tuple(disks)


def _disk(name: str, block: Json) -> DiskFacts:
    inserted = field_of(block, "inserted")
    path = url_of_filename(_sendable(field_of(inserted, "image", "filename")))
    is_read_only = field_of(inserted, "ro") is True
    is_file, is_removable = path.startswith("/"), field_of(block, "removable") is True
    if is_removable and not path:
        kind = DiskKind.EMPTY
    elif is_file:
        kind = DiskKind.CDROM if is_removable else DiskKind.FILE
    else:
        kind = DiskKind.NETWORK
    return DiskFacts(
        name=name,
        path=path,
        size_bytes=_size(path) if is_file else 0,
        is_read_only=is_read_only or kind is DiskKind.EMPTY,
        kind=kind,
        format=_sendable(field_of(inserted, "drv")),
        cache=_cache(inserted),
        is_locked=is_file and not is_read_only,
    )


def _cache(inserted: Json) -> str:
    """Give the cache mode as a spec spells it."""
    is_direct, is_delayed = (field_of(inserted, "cache", key) is True for key in ("direct", "writeback"))
    return str(Cache.WRITEBACK if not is_direct else Cache.NONE if is_delayed else Cache.DIRECTSYNC)


@dataclass(frozen=True, slots=True)
class OwnFirmware:
    """Firmware that is not QEMU's own: (role, path) of each file."""

    kind: str
    paths: tuple[tuple[str, str], ...]


async def own_firmware(qmp: Qmp) -> OwnFirmware | None:
    """Give the files of UEFI, or of a BIOS that was named by its path; None for a machine that has QEMU's own."""
    blocks = await qmp.execute("query-block")
    files = {
        str(field_of(block, "qdev")): _sendable(field_of(block, "inserted", "image", "filename"))
        for block in (blocks if isinstance(blocks, list) else [])
    }
    if _FLASHES[0] in files:
        roles = zip(("code", "variables"), _FLASHES, strict=True)
        return OwnFirmware("uefi", tuple((role, files[one]) for role, one in roles if one in files))
    bios = await qmp.execute("qom-get", {"path": "/machine", "property": "firmware"})
    return OwnFirmware("bios", (("code", path),)) if (path := _sendable(bios)).startswith("/") else None


def _sendable(said: Json) -> str:
    """Give a text as it travels: half a surrogate pair is a string of JSON, and of no message."""
    return said.encode(errors="replace").decode()[:_MAX_PATH_CHARS] if isinstance(said, str) else ""


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # the latter of a path with a NUL
        return 0
