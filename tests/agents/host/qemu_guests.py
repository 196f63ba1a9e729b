"""Real QEMU guests of a fleet: started on one host, looked at on any, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import anyio
import anyio.to_thread

from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.describe import run_state
from agents.hypervisors.qemu.launch import launch
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.spec import Accel, MemorySpec, QemuSpec
from migrate.phases import Phase
from migrate.stats import Report
from tests.agents.host.fleet import HOSTS, Fleet, report_of, running_fleet
from tests.agents.host.processes import Processes, running_processes
from tests.agents.hypervisors.qemu.conftest import QEMU
from tests.agents.hypervisors.qemu.linux import Boot, Console


@dataclass
class QemuGuests:
    """The guests of one fleet."""

    fleet: Fleet
    boot: Boot
    specs: dict[str, QemuSpec] = field(default_factory=dict)

    def spec(self, **changed: object) -> QemuSpec:
        """A machine that runs the workload with 10 MiB/s."""
        values: dict[str, object] = {
            "guest_id": str(uuid.uuid4()),
            "name": "worker",
            "machine": "pc-q35-7.2",
            "accel": Accel.TCG,
            "cpu": "Nehalem",
            "vcpus": 1,
            "memories": (MemorySpec(name="ram0", size_bytes=256 << 20),),
            "kernel": self.boot.kernel,
            "initrd": self.boot.initrd(),
            "append": "console=ttyS0 quiet -- set=48 rate=10",
            **changed,
        }
        return QemuSpec(**values)  # type: ignore[arg-type]

    def host(self, name: str, taps: tuple[str, ...] = ()) -> QemuHost:
        return QemuHost(
            dir=self.fleet.qemu_dir(name),
            binary=QEMU,
            shared_dirs=(self.fleet.shared,),
            shared_devices=("/dev/loop*",),
            network_disks=tuple(
                disk.path for spec in self.specs.values() for disk in spec.disks if "://" in disk.path
            ),
            kernel_dirs=(self.boot.folder,),
            accels=(Accel.TCG,),
            taps=taps,
        )

    async def start(self, host: str, spec: QemuSpec, *, beats: int = 3, taps: tuple[str, ...] = ()) -> None:
        """Start a guest and wait until it works."""
        self.specs[spec.guest_id] = spec
        qmp, _ = await launch(spec, self.host(host, taps), is_incoming=False)
        await qmp.aclose()
        await anyio.to_thread.run_sync(self.console(host, spec).wait_beats, beats)

    def paths(self, host: str, spec: QemuSpec) -> QemuPaths:
        return QemuPaths.of_guest(self.fleet.qemu_dir(host), spec.guest_id)

    def console(self, host: str, spec: QemuSpec) -> Console:
        return Console(self.paths(host, spec).log)

    def pid(self, host: str, spec: QemuSpec) -> int | None:
        """The process of a guest on a host, if there is one."""
        return pid_of(self.paths(host, spec))

    @asynccontextmanager
    async def monitor(self, host: str, spec: QemuSpec) -> AsyncIterator[Qmp]:
        """The guest's second monitor: the agent has the first."""
        qmp = await Qmp.connect(self.paths(host, spec).monitor)
        try:
            yield qmp
        finally:
            await qmp.aclose()

    async def state(self, host: str, spec: QemuSpec) -> str:
        """What QEMU says that a guest does on a host; `none` where there is no such process.

        `starting` is one that has written its number, and has no monitor yet: its agent may have been killed just then.
        """
        if self.pid(host, spec) is None:
            return "none"
        if not await anyio.Path(self.paths(host, spec).monitor).exists():
            return "starting"
        async with self.monitor(host, spec) as qmp:
            return await run_state(qmp)

    async def move(self, spec: QemuSpec, source: str, to: str, **wishes: object) -> Report:
        """Move a guest, and read all of its old RAM again when it has left."""
        return report_of(await self.fleet.move(spec.guest_id, source, to, audit=True, **wishes))

    async def check_moved(self, spec: QemuSpec, report: Report, source: str, to: str) -> None:
        """Insist that the guest runs at `to` alone, that it is the same to the byte, and that it goes on."""
        assert (report.phase, report.runs_on) == (Phase.COMPLETE, to), report.error
        assert report.source_digest is not None
        assert report.source_digest == report.destination_digest
        assert self.pid(source, spec) is None
        await self.check_runs(to, spec)

    async def check_stayed(self, spec: QemuSpec, report: Report, source: str, to: str) -> None:
        """Insist that the guest runs on where it was, and that nothing of it is elsewhere."""
        assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, source), report.error
        assert self.pid(to, spec) is None
        await self.check_runs(source, spec)

    async def check_runs(self, host: str, spec: QemuSpec) -> None:
        """Insist that a guest runs, beats and finds its memory as it left it."""
        assert await self.state(host, spec) == "running"
        beats = await anyio.to_thread.run_sync(self.console(host, spec).wait_beats, 2)
        assert beats[-1].errors == 0, beats[-1]
        assert beats[-1].checks > beats[-2].checks

    def end_all(self) -> None:
        """Kill every QEMU of these guests."""
        for spec in self.specs.values():
            for host in HOSTS:
                end_qemu(self.paths(host, spec))


def end_qemu(paths: QemuPaths) -> None:
    """Kill the QEMU of these paths, if there is one."""
    if (pid := pid_of(paths)) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pid_of(paths: QemuPaths) -> int | None:
    """The process that wrote this pid file, if it is a QEMU with this monitor still."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(paths.pid.read_text())
        if str(paths.qmp).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


@contextlib.contextmanager
def qemu_processes(
    folder: Path, event_loop: str, limits: str, fronts: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[Processes, QemuGuests]]:
    """Two agents as processes of their own, and no guest yet."""
    boot = Boot.at(folder / "boot")
    with running_processes(folder, event_loop, limits, qemu="\n", fronts=fronts) as processes:
        guests = QemuGuests(processes.fleet, boot)
        try:
            yield processes, guests
        finally:
            guests.end_all()


@asynccontextmanager
async def qemu_fleet(
    folder: Path, limits: str = "", qemu: str = "", storage: str = ""
) -> AsyncIterator[QemuGuests]:
    """Two agents in this loop, and no guest yet."""
    guests = QemuGuests(Fleet(folder), Boot.at(folder / "boot"))
    try:
        async with running_fleet(folder, limits=limits, qemu=qemu or "\n", storage=storage) as fleet:
            guests.fleet = fleet
            yield guests
    finally:
        guests.end_all()


def vm_flags(pid: int | None) -> set[str]:
    """All flags of the mappings of a process; `uw` is a userfaultfd's write-protection."""
    return {
        flag
        for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines()
        if line.startswith("VmFlags:")
        for flag in line.split()[1:]
    }
