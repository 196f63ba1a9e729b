"""What both ends of a move have in hand: a QMP connection, the process, and its RAM mapped.

Law: opening takes hold of a guest and changes nothing in it; `release` leaves it as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from agents.hypervisors.qemu.describe import block_places
from agents.hypervisors.qemu.errors import QemuError, QemuGone, QmpFailed
from agents.hypervisors.qemu.launch import UNUSED_CLOSES_WITHIN_S, Process, end
from agents.hypervisors.qemu.processmap import RamBlockPlace, open_block, places_of
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.spec import QemuSpec
from memory.blocks import BlockRam
from memory.layout import Layout
from memory.ram import MappedRam
from migrate.errors import GuestRefused

__all__ = ["Hold", "OpenGuest", "hold"]


@dataclass(slots=True, kw_only=True)
class Hold:
    """One guest that is held: whoever has it closes it."""

    spec: QemuSpec
    qmp: Qmp
    process: Process
    paths: QemuPaths
    places: tuple[RamBlockPlace, ...]
    ram: BlockRam
    is_open: bool = True
    on_release: Callable[[], object] = lambda: None


async def hold(qmp: Qmp, paths: QemuPaths, spec: QemuSpec, *, is_filled_here: bool = False) -> Hold:
    """Map the RAM of the QEMU behind a connection, which belongs to the hold from here on.

    Args:
        is_filled_here: the RAM is to be filled by this process; what it takes is then charged to the guest's cgroup.

    Raises:
        GuestRefused, QemuError: its RAM cannot be mapped; the connection is the caller's still.
    """
    process = Process(qmp.peer_pid)
    try:
        blocks = await block_places(qmp, spec)
        places, ram = await anyio.to_thread.run_sync(_map, process.pid, blocks, is_filled_here)
    except BaseException:
        process.close()
        raise
    return Hold(spec=spec, qmp=qmp, process=process, paths=paths, places=places, ram=ram)


class OpenGuest:
    """A guest that a migration holds."""

    def __init__(self, held: Hold) -> None:
        self._held = held

    @property
    def ram(self) -> BlockRam:
        return self._held.ram

    async def destroy(self) -> None:
        """End it for good; its RAM is free when this returns. May be called twice."""
        held = self._held
        if not held.is_open:
            return
        try:
            await end(held.qmp, held.process, held.paths, closes_within_s=UNUSED_CLOSES_WITHIN_S)
        except QemuError as exc:
            raise GuestRefused(str(exc)) from exc
        finally:
            await self.release()

    async def release(self) -> None:
        """Let go of it and leave it as it is. May be called twice."""
        held = self._held
        if held.is_open:
            held.is_open = False
            held.on_release()
            await anyio.to_thread.run_sync(held.ram.close)
            held.process.close()
            with contextlib.suppress(QmpFailed, QemuGone):
                await held.qmp.aclose()


def _map(
    pid: int, blocks: list[tuple[str, int, int]], is_filled_here: bool
) -> tuple[tuple[RamBlockPlace, ...], BlockRam]:
    places = places_of(pid, blocks)
    # Where both are charged to one cgroup the plain way is the faster one.
    by_owner = is_filled_here and not _share_memory_cgroup(pid)
    mapped: list[MappedRam] = []
    try:
        for place in places:
            fd = open_block(pid, place)
            try:
                layout = Layout.of_sizes([(place.name, place.size_bytes)])
                mapped.append(MappedRam(fd, layout, owner=(pid, place.address) if by_owner else None))
            finally:
                os.close(fd)
    except BaseException:
        for one in mapped:
            one.close()
        raise
    return places, BlockRam(mapped)


def _share_memory_cgroup(pid: int) -> bool:
    """Tell whether this process and another are charged for memory together."""
    try:
        ours, theirs = (Path(f"/proc/{one}/cgroup").read_text() for one in ("self", pid))
    except OSError:
        return False
    return _memory_lines(ours) == _memory_lines(theirs)


def _memory_lines(cgroups: str) -> list[str]:
    return [line for line in cgroups.splitlines() if line.startswith("0::") or ":memory:" in line]
