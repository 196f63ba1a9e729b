"""QEMU guests of this host, for `vmferry guest`.

Law: asks by a guest's second monitor, which the agent leaves alone, and by the first where there is no other. A guest
is started by the rules that a guest from another host must keep, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents.hypervisors.local import LocalGuest
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.errors import QemuError, QemuGone
from agents.hypervisors.qemu.found import Found, interview
from agents.hypervisors.qemu.launch import Process, end, launch
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.rundir import QemuPaths, monitors
from agents.hypervisors.qemu.spec import KIND, QemuSpec

__all__ = ["LocalQemu"]

_ASK_TIMEOUT_S: Final = 3.0
_TAIL_BYTES: Final = 16 << 10


class LocalQemu:
    """`agents.hypervisors.local.LocalHypervisor` of one directory."""

    def __init__(self, host: QemuHost) -> None:
        self._host = host
        self.place = host.dir

    async def guests(self) -> list[LocalGuest]:
        """List them; one that ends or does not answer while we look is not here."""
        found = []
        for monitor in await anyio.to_thread.run_sync(lambda: list(monitors(self.place.absolute()))):
            paths = QemuPaths.of_monitor(monitor)
            with contextlib.suppress(QemuError):
                async with _asking(paths) as qmp:
                    found.append(_shown(await interview(qmp, paths)))
        return found

    async def start(self, description: Path) -> LocalGuest:
        """Start a guest. Raises QemuError."""
        spec = QemuSpec.from_toml(description)
        qmp, paths = await launch(spec, self._host, is_incoming=False)
        try:
            return _shown(await interview(qmp, paths))
        finally:
            await qmp.aclose()

    async def stop(self, guest: LocalGuest, *, now: bool, timeout_s: float) -> None:
        """Press its power button and wait, or end it `now`.

        Raises:
            QemuGone: its operating system did not end in time; it runs on.
        """
        paths = self._paths(guest)
        process = Process(guest.pid)
        try:
            async with _asking(paths) as qmp:
                if now:
                    await end(qmp, process, paths)
                    return
                await qmp.execute("system_powerdown")
            if not await anyio.to_thread.run_sync(process.has_ended, timeout_s):
                raise QemuGone(
                    f"{guest.name} runs on: its operating system did not end within {timeout_s:g} s of its power "
                    "button; --now ends it at once"
                )
            paths.remove()
        finally:
            process.close()

    async def console_text(self, guest: LocalGuest) -> str:
        """Give the end of what it has printed since it came to this host."""
        return await anyio.to_thread.run_sync(_tail, self._paths(guest).log)

    def console_socket(self, guest: LocalGuest) -> Path | None:
        """Give the socket of its serial port; a QEMU that somebody else started has none here."""
        path = self._paths(guest).console
        return path if path.exists() else None

    def _paths(self, guest: LocalGuest) -> QemuPaths:
        return QemuPaths.of_monitor(Path(str(guest.details["monitor"])))


@contextlib.asynccontextmanager
async def _asking(paths: QemuPaths) -> AsyncIterator[Qmp]:
    own = await anyio.to_thread.run_sync(paths.monitor.exists)
    qmp = await Qmp.connect(paths.monitor if own else paths.qmp, timeout_s=_ASK_TIMEOUT_S)
    try:
        yield qmp
    finally:
        with anyio.CancelScope(shield=True):
            await qmp.aclose()


def _shown(found: Found) -> LocalGuest:
    spec = found.spec
    return LocalGuest(
        kind=KIND,
        guest_id=found.guest_id,
        name=found.name,
        state="incoming" if found.is_incoming else found.state,
        pid=found.pid,
        ram_bytes=spec.ram_bytes if spec else 0,
        cpu_model=spec.cpu if spec else "",
        problem="; ".join(found.problems),
        details={
            "monitor": str(found.paths.qmp),
            "machine": spec.machine if spec else None,
            "vcpus": spec.vcpus if spec else None,
            "disks": [disk.path for disk in spec.disks] if spec else None,
            "cannot_move_because": list(found.problems) or None,
        },
    )


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
