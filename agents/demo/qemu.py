"""The demo with a stock QEMU: a Linux guest whose program writes memory, keeps a heartbeat and checks what it wrote.

Law: the story is `run`'s; here is what is particular to this kind of guest. It is not deterministic: it is compared
with itself, by its own checks, and not with another run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents.demo.errors import NoQemu
from agents.demo.guests import Look
from agents.demo.scratch import HOSTS, Scratch
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.describe import run_state
from agents.hypervisors.qemu.errors import QemuGone
from agents.hypervisors.qemu.hostmodels import ModelCatalog
from agents.hypervisors.qemu.launch import Process, launch
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.spec import Accel, MemorySpec, QemuSpec
from agents.testguest.image import Heartbeat, KernelMissing, find_kernel, heartbeats, initramfs
from agents.units import approx_size

__all__ = ["QemuDemoGuest", "best_accel", "find_qemu"]

BOOT_TIMEOUT_S: Final = 90.0
LOOK_EVERY_S: Final = 0.2
BEATS_BEFORE: Final = 5
BEATS_AFTER: Final = 3
# Its kernel and what it boots with; the workload has what is left.
_SYSTEM_BYTES: Final = 96 << 20
# A model that every x86-64 server of the last fifteen years has, and QEMU's own emulation too.
_CPU: Final = "Nehalem"
_MIB: Final = 1 << 20
_CPUINFO: Final = Path("/proc/cpuinfo")


def find_qemu() -> Path:
    """Give QEMU for x86-64.

    Raises:
        NoQemu: with the remedy.
    """
    found = shutil.which("qemu-system-x86_64") or shutil.which("qemu-kvm", path="/usr/libexec:/usr/bin")
    if found is None:
        raise NoQemu(
            "there is no qemu-system-x86_64 here: Debian: apt-get install qemu-system-x86; Fedora: dnf "
            "install qemu-system-x86"
        )
    return Path(found)


def best_accel() -> Accel:
    """Give KVM where this machine's processor has virtualisation and this user may use it, else TCG."""
    flags = _CPUINFO.read_text(errors="replace") if _CPUINFO.exists() else ""
    has_hardware = any(f" {flag} " in flags.replace("\n", " ") for flag in ("vmx", "svm"))
    return Accel.KVM if has_hardware and os.access("/dev/kvm", os.R_OK | os.W_OK) else Accel.TCG


class QemuDemoGuest:
    """`agents.demo.guests.DemoGuest`."""

    def __init__(
        self, scratch: Scratch, *, ram_bytes: int, dirty_bytes_per_s: int, binary: Path, accel: Accel
    ) -> None:
        self._scratch = scratch
        self._binary = binary
        self._accel = accel
        self._rate_mib = max(dirty_bytes_per_s // _MIB, 1)
        room_mib = max((ram_bytes - _SYSTEM_BYTES) // _MIB, 16)
        self._set_mib, self._fill_mib = room_mib // 4, room_mib // 4
        self._ram_bytes = ram_bytes
        self.guest_id = str(uuid.uuid4())

    @property
    def content_bytes(self) -> int:
        return (self._set_mib + self._fill_mib) * _MIB + _SYSTEM_BYTES // 2

    @property
    def sentence(self) -> str:
        return f"Linux in QEMU ({self._accel}), {approx_size(self._ram_bytes)} of RAM, writes {self._rate_mib} MiB/s"

    async def start(self, host: str) -> None:
        """Boot Linux, and let its program run a little. Raises QemuError, NoQemu."""
        spec = await self._spec()
        qmp, _ = await launch(spec, self.host(host), is_incoming=False)
        await qmp.aclose()
        await self._beats(host, BEATS_BEFORE, BOOT_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def watching(self, host: str) -> AsyncIterator[_Watcher]:
        """Look at it on a host that it leaves."""
        process = Process(int(await anyio.Path(self._paths(host).pid).read_text()))
        try:
            yield _Watcher(self, host, await self.look(host), process)
        finally:
            process.close()

    async def look(self, host: str) -> Look:
        """Read its console, once it has said something new there, and ask QEMU for its state."""
        beats = await self._beats(host, BEATS_AFTER, BOOT_TIMEOUT_S)
        qmp = await Qmp.connect(self._paths(host).monitor)
        try:
            state = await run_state(qmp)
        finally:
            await qmp.aclose()
        return _look(beats[-1], state)

    def glance(self, host: str) -> Look | None:
        """Give what its console says last, without waiting."""
        beats = self._console(host)
        return _look(beats[-1], "running") if beats else None

    async def take(self, host: str) -> None:
        """Nothing: there is no other run of it that would be the same."""

    async def run_unmoved(self, taken: object, tell: Callable[[str], None]) -> None:
        """Nothing: its second run would not be the same."""

    async def end(self) -> None:
        """End it at either host. Not cancelled by anything."""
        with anyio.CancelScope(shield=True):
            for host in HOSTS:
                paths = self._paths(host)
                with contextlib.suppress(OSError, ValueError, QemuGone):
                    process = Process(int(await anyio.Path(paths.pid).read_text()))
                    try:
                        process.kill()
                        await anyio.to_thread.run_sync(process.has_ended, 10.0)
                    finally:
                        process.close()
                    paths.remove()

    async def _spec(self) -> QemuSpec:
        boot = self._scratch.boot
        try:
            kernel = find_kernel()
        except KernelMissing as exc:
            raise NoQemu(str(exc)) from exc

        def make() -> None:
            boot.mkdir(exist_ok=True)
            shutil.copy(kernel, boot / "vmlinuz")
            (boot / "initrd").write_bytes(initramfs())

        await anyio.to_thread.run_sync(make)
        machines = (await ModelCatalog(self._binary).of(self._accel)).machines
        newest = max((name for name in machines if name.startswith("pc-q35-")), key=_version, default="")
        words = f"set={self._set_mib} fill={self._fill_mib} rate={self._rate_mib}"
        return QemuSpec(
            guest_id=self.guest_id,
            name="demo",
            machine=newest,
            accel=self._accel,
            cpu=_CPU,
            vcpus=1,
            memories=(MemorySpec(name="ram0", size_bytes=self._ram_bytes // _MIB * _MIB),),
            kernel=str(boot / "vmlinuz"),
            initrd=str(boot / "initrd"),
            append=f"console=ttyS0 quiet -- {words}",
        )

    def host(self, host: str) -> QemuHost:
        """What the directory of the demo lets a guest be."""
        return QemuHost(
            dir=self._scratch.qemu_dir(host),
            binary=self._binary,
            shared_dirs=(self._scratch.shared,),
            kernel_dirs=(self._scratch.boot,),
            accels=(self._accel,),
        )

    def _paths(self, host: str) -> QemuPaths:
        return QemuPaths.of_guest(self._scratch.qemu_dir(host), self.guest_id)

    def _console(self, host: str) -> list[Heartbeat]:
        try:
            return heartbeats(self._paths(host).log.read_bytes())
        except OSError:
            return []

    async def _beats(self, host: str, more: int, timeout_s: float) -> list[Heartbeat]:
        wanted = len(self._console(host)) + more
        deadline_s = anyio.current_time() + timeout_s
        while anyio.current_time() < deadline_s:
            if len(beats := self._console(host)) >= wanted:
                return beats
            await anyio.sleep(0.05)
        said = (
            self._paths(host).log.read_text(errors="replace")[-300:] if self._paths(host).log.exists() else ""
        )
        raise NoQemu(
            f"the guest on {host} gave no sign of life within {timeout_s:g} s; it said last: {said!r}"
        )


class _Watcher:
    """`agents.demo.guests.Watcher`."""

    def __init__(self, guest: QemuDemoGuest, host: str, first: Look, process: Process) -> None:
        self._guest = guest
        self._host = host
        self._process = process
        self.last = first

    async def watch(self) -> None:
        while True:
            await anyio.sleep(LOOK_EVERY_S)
            self.last = self._guest.glance(self._host) or self.last

    def has_ended(self) -> bool:
        return self._process.has_ended()


def _look(beat: Heartbeat, state: str) -> Look:
    return Look(
        ticks=beat.writes,
        work=beat.checks,
        work_unit="checks of its memory",
        written=beat.writes,
        errors=beat.errors,
        is_running=state == "running",
        state=state,
    )


def _version(machine: str) -> tuple[int, ...]:
    return tuple(int(part) for part in machine.removeprefix("pc-q35-").split(".") if part.isdecimal())
