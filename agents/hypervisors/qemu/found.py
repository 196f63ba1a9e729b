"""A QEMU that was found by its monitor: who it is, and what its command line says that it is.

Law: connects for a moment and lets go; what a QEMU is follows from its process, never from its file's name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

from agents.hypervisors.qemu.adopt import spec_of
from agents.hypervisors.qemu.describe import run_state
from agents.hypervisors.qemu.errors import NotAdoptable
from agents.hypervisors.qemu.observe import cpu_argument
from agents.hypervisors.qemu.processmap import command_line
from agents.hypervisors.qemu.qmp import Qmp, field_of
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.spec import QemuSpec

__all__ = ["Found", "connected", "interview", "remove_if_dead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One QEMU of the directory. `spec` is None where it cannot be described: `problems` say why. `cpu` is -cpu."""

    paths: QemuPaths
    pid: int
    guest_id: str
    name: str
    state: str
    spec: QemuSpec | None
    problems: tuple[str, ...] = ()
    cpu: str = ""

    @property
    def is_incoming(self) -> bool:
        """It has not run on this host yet."""
        return self.state == "inmigrate" or (self.state != "running" and self.paths.incoming.exists())


@contextlib.asynccontextmanager
async def connected(monitor: Path, *, timeout_s: float) -> AsyncIterator[Qmp]:
    """Hold its monitor while the block runs."""
    qmp = await Qmp.connect(monitor, timeout_s=timeout_s)
    try:
        yield qmp
    finally:
        with anyio.CancelScope(shield=True):
            await qmp.aclose()


async def interview(qmp: Qmp, paths: QemuPaths) -> Found:
    """Ask a QEMU who it is, and read from its command line what it is."""
    guest_id = str(field_of(await qmp.execute("query-uuid"), "UUID"))
    name = str(field_of(await qmp.execute("query-name"), "name") or paths.qmp.stem)
    argv = await anyio.to_thread.run_sync(command_line, qmp.peer_pid)
    spec: QemuSpec | None = None
    problems: tuple[str, ...] = ()
    try:
        spec = spec_of(argv)
        if spec.guest_id != guest_id:
            raise NotAdoptable(f"its command line says -uuid {spec.guest_id}, and it is {guest_id}")
    except NotAdoptable as exc:
        spec, problems = None, exc.problems
    return Found(
        paths=paths,
        pid=qmp.peer_pid,
        guest_id=guest_id,
        name=name,
        state=await run_state(qmp),
        spec=spec,
        problems=problems,
        cpu=cpu_argument(argv),
    )


def remove_if_dead(monitor: Path) -> None:
    """Remove what a QEMU of ours left that has ended: its lock on its pid file went with it."""
    paths = QemuPaths.of_monitor(monitor)
    with contextlib.suppress(OSError):
        fd = os.open(paths.pid, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            paths.remove()
        finally:
            os.close(fd)
