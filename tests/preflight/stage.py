"""Two agents in this process and the guests of one case, made as it asks for."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import anyio.to_thread

from agents.api import Check, CheckReport
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.launch import launch
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.spec import Accel, MemorySpec, QemuSpec
from tests.agents.host.fleet import Fleet, running_fleet
from tests.agents.host.processes import running_processes
from tests.agents.host.qemu_guests import end_qemu
from tests.agents.hypervisors.qemu.conftest import QEMU

__all__ = ["Build", "Stage"]


@dataclass
class Stage:
    """Where one case plays: guests start on host-a and are to go to host-b."""

    fleet: Fleet
    build: Build
    machines: list[QemuPaths] = field(default_factory=list)

    @property
    def shared(self) -> Path:
        return self.fleet.shared

    async def embedded(self, host: str = "host-a", **changed: object) -> str:
        """Start a guest that runs machine code in a process of ours; give its identity."""
        spec = await anyio.to_thread.run_sync(lambda: self.fleet.start_guest(host, **changed))
        return spec.guest_id

    def qemu_spec(self, **changed: object) -> QemuSpec:
        """A small machine with nothing but its firmware: it runs, and has no system to boot."""
        values: dict[str, object] = {
            "guest_id": str(uuid.uuid4()),
            "name": "worker",
            "machine": "pc-q35-7.2",
            "accel": Accel.TCG,
            "cpu": "Nehalem",
            "vcpus": 1,
            "memories": (MemorySpec(name="ram0", size_bytes=128 << 20),),
            **changed,
        }
        return QemuSpec(**values)  # type: ignore[arg-type]

    async def qemu(
        self, host: str = "host-a", *, place: Mapping[str, object] = MappingProxyType({}), **changed: object
    ) -> str:
        """Start a QEMU guest as an operator of that `place` would; give its identity."""
        spec = self.qemu_spec(**changed)
        facts = {
            "dir": self.fleet.qemu_dir(host),
            "binary": QEMU,
            "shared_dirs": (self.shared,),
            "accels": (Accel.TCG,),
            **place,
        }
        self.machines.append(QemuPaths.of_guest(self.fleet.qemu_dir(host), spec.guest_id))
        qmp, _ = await launch(spec, QemuHost(**facts), is_incoming=False)  # type: ignore[arg-type]
        await qmp.aclose()
        return spec.guest_id

    async def check(self, guest_id: str, *, measures: bool = False) -> CheckReport:
        """Ask host-a whether its guest could go to host-b; to measure the path takes a second more."""
        began_s = time.perf_counter()
        answer = await self.fleet.ask("host-a", Check(guest=guest_id, to="host-b", measures=measures))
        self.build.check_s = time.perf_counter() - began_s
        if not isinstance(answer, CheckReport):
            raise AssertionError(answer)
        if answer.path is not None:
            self.build.check_s -= answer.path.measured_s
        return answer

    def end_machines(self) -> None:
        for paths in self.machines:
            end_qemu(paths)


@dataclass(slots=True)
class Build:
    """Makes the hosts of a case in `folder`, once. `check_s` is what the last check took, without measuring.

    Agents that are processes have that event loop; the others are in this process, and on its own.
    """

    folder: Path
    event_loop: str = "asyncio"
    check_s: float = 0.0

    @asynccontextmanager
    async def __call__(self, **settings: object) -> AsyncIterator[Stage]:
        """Two agents that serve. The settings are those of `running_fleet`, or of `running_processes`."""
        folder = self.folder
        # A busy machine's answer may take long; what a check takes is measured, not bounded here.
        settings = {"limits": 'outage = "60s"', **settings}
        async with AsyncExitStack() as stack:
            if "prefixes" in settings:  # processes, whose commands begin so
                agents = running_processes(folder, self.event_loop, **settings)  # type: ignore[arg-type]
                fleet = stack.enter_context(agents).fleet
            else:
                fleet = await stack.enter_async_context(running_fleet(folder, **settings))  # type: ignore[arg-type]
            stage = Stage(fleet, self)
            stack.callback(stage.end_machines)
            yield stage
