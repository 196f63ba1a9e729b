"""QEMU processes that a person has started by hand: whatever arguments they have, and ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import anyio.to_thread

from tests.agents.host.fleet import Fleet
from tests.agents.hypervisors.qemu.conftest import QEMU
from tests.waiting import until_blocking

__all__ = ["ByHand", "started_by_hand"]

_STARTED_S = 10.0


class ByHand:
    """QEMU processes that nobody told vmferry of; they run their firmware and nothing else."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._pid_files: list[Path] = []
        self._helpers: list[subprocess.Popen[bytes]] = []

    async def start(
        self,
        host: str,
        *more: str,
        name: str = "web1",
        machine: str = "pc-q35-7.2",
        memory: str = "memory-backend-memfd,id=ram0,size=64M,share=on",
        ram: str = "64M",
    ) -> str:
        """Start one of 64 MiB with a disk on the shared storage, and with more arguments; give its identity."""
        folder = self.fleet.qemu_dir(host)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        guest_id = str(uuid.uuid4())
        disk = self.fleet.shared / f"{guest_id}.raw"
        disk.write_bytes(bytes(1 << 20))
        pid_file = folder / f"{name}.pid"
        self._pid_files.append(pid_file)
        argv = [
            *(str(QEMU), "-name", name, "-uuid", guest_id, "-cpu", "Nehalem", "-m", ram),
            *("-machine", f"{machine},accel=tcg,memory-backend=ram0", "-nodefaults", "-display", "none"),
            *("-object", memory, "-serial", "null", "-daemonize", "-pidfile", str(pid_file)),
            *("-qmp", f"unix:{self.monitor(host, name)},server=on,wait=off"),
            "-blockdev",
            "driver=raw,node-name=d0,cache.direct=on,file.driver=file,file.cache.direct=on,"
            f"file.filename={disk}",
            *("-device", "virtio-blk-pci,drive=d0,id=disk0", *more),
        ]
        # What it says goes to no pipe: the guest would hold its end.
        await anyio.to_thread.run_sync(lambda: subprocess.run(argv, check=True, timeout=30))
        return guest_id

    def monitor(self, host: str, name: str = "web1") -> Path:
        return self.fleet.qemu_dir(host) / f"{name}.qmp"

    async def start_helper(self, *argv: str, socket: Path) -> None:
        """Start a program that a device needs, and wait until it listens."""

        def start() -> None:
            self._helpers.append(subprocess.Popen(argv))
            until_blocking(socket.exists, f"the socket of {argv[0]}", within_s=_STARTED_S)

        await anyio.to_thread.run_sync(start)

    def end_all(self) -> None:
        for path in self._pid_files:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        for helper in self._helpers:
            helper.terminate()
            helper.wait(timeout=10)


@contextlib.contextmanager
def started_by_hand(fleet: Fleet) -> Iterator[ByHand]:
    """No process yet; those that are started end with the block."""
    guests = ByHand(fleet)
    try:
        yield guests
    finally:
        guests.end_all()
