"""Room at the destination."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.preflight.evidence import Inspection
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "MEMORY", "OVERHEAD_BYTES", "judge"]

MEMORY: Final = Check(
    check_id="memory",
    asked="Has the destination enough free memory for the guest?",
    why="A host that runs out of memory ends processes, the guest's or others'",
    remedy="Free memory there, or choose another host",
)
CHECKS: Final = (MEMORY,)

# What the destination needs beside the guest's RAM: the hypervisor's own process, page tables, buffers.
OVERHEAD_BYTES: Final = 64 << 20


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge the memory that is free there."""
    guest, host = inspection.guest, inspection.host
    needed = guest.ram_bytes + OVERHEAD_BYTES - inspection.reserved_bytes
    if needed <= host.free_memory_bytes:
        yield MEMORY.ok(
            f"{host.name} has {host.free_memory_bytes >> 20} MiB free, {max(needed, 0) >> 20} MiB are needed"
        )
    else:
        yield MEMORY.refused(
            f"{host.name} has {host.free_memory_bytes >> 20} MiB free, and {guest.name} needs {needed >> 20} MiB"
        )
