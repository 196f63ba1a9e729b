"""What a running QEMU says of a guest that no spec describes: enough for every check that needs no spec.

Law: asks by QMP, changes nothing. What cannot be had is left out: the checks say `unknown`.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Final

import anyio.to_thread

from agents.hypervisors.qemu.describe import features_of_expansion
from agents.hypervisors.qemu.errors import QmpFailed
from agents.hypervisors.qemu.qmp import Json, Qmp, field_of
from migrate.facts import BlockFacts, CpuFacts, DiskFacts

__all__ = ["MAX_DISKS", "OwnFirmware", "observed_cpu", "observed_disks", "observed_ram", "own_firmware"]

# As many as a spec may have; the guest cannot be moved anyway.
MAX_DISKS: Final = 64
_CPU_SUFFIX: Final = "-x86_64-cpu"
# Where QEMU puts UEFI: its code, its variables.
_FLASHES: Final = ("pflash0", "pflash1")


async def observed_cpu(qmp: Qmp) -> CpuFacts:
    """Give the model of the first vCPU and each feature that it really has: 250 questions, some 10 ms."""
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
    return (BlockFacts(name="ram", size_bytes=total),)


async def observed_disks(qmp: Qmp) -> tuple[DiskFacts, ...]:
    """Give the disks that are files, numbered as QEMU lists them."""
    disks: list[DiskFacts] = []
    for number, (device, path, is_read_only) in enumerate(_block_files(await qmp.execute("query-block"))):
        if device not in _FLASHES and len(disks) < MAX_DISKS:
            size_bytes = await anyio.to_thread.run_sync(_size, path)
            disks.append(
                DiskFacts(name=f"disk{number}", path=path, size_bytes=size_bytes, is_read_only=is_read_only)
            )
    return tuple(disks)


@dataclass(frozen=True, slots=True)
class OwnFirmware:
    """Firmware that is not QEMU's own: (role, path) of each file."""

    kind: str
    paths: tuple[tuple[str, str], ...]


async def own_firmware(qmp: Qmp) -> OwnFirmware | None:
    """Give the files of UEFI, or of a BIOS that was named by its path; None for a machine that has QEMU's own."""
    files = {device: path for device, path, _ in _block_files(await qmp.execute("query-block"))}
    if _FLASHES[0] in files:
        roles = zip(("code", "variables"), _FLASHES, strict=True)
        return OwnFirmware("uefi", tuple((role, files[one]) for role, one in roles if one in files))
    bios = await qmp.execute("qom-get", {"path": "/machine", "property": "firmware"})
    return OwnFirmware("bios", (("code", bios),)) if isinstance(bios, str) and bios.startswith("/") else None


def _block_files(blocks: Json) -> list[tuple[str, str, bool]]:
    files = []
    for block in blocks if isinstance(blocks, list) else []:
        path = field_of(block, "inserted", "image", "filename")
        if isinstance(path, str) and path.startswith("/"):
            files.append((str(field_of(block, "device")), path, field_of(block, "inserted", "ro") is True))
    return files


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
