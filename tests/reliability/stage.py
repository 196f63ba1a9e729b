"""Where faults are tried: two agents that are processes, the networks before them, and one guest that goes to and fro.

Law: nothing is asserted in here: what became of the guest is looked at, and counted. A guest is *lost* when no copy
runs any more, *doubled* when two were seen to run at once, and its RAM is *wrong* when the digests differ or the guest
itself finds its memory changed.

Tasks: one that looks for a second copy all the while that a trial runs; it ends with the trial.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final, Protocol

import anyio
from anyio.to_thread import run_sync

from agents.api import JobList, JobView, ListJobs
from agents.hypervisors.embedded.errors import GuestGone
from agents.hypervisors.embedded.spec import Content, EmbeddedSpec
from agents.hypervisors.qemu.errors import QemuError
from agents.hypervisors.qemu.spec import MemorySpec, QemuSpec
from migrate.phases import Phase
from migrate.stats import Report
from tests.agents.host.fleet import HOSTS, Fleet, scratch_folder
from tests.agents.host.network import FRONTS, Network, networks
from tests.agents.host.processes import Processes, running_processes
from tests.agents.host.qemu_guests import QemuGuests, qemu_processes
from tests.waiting import LOOK_EVERY_S, looks
from transport.errors import TransportError

__all__ = ["Kind", "Stage", "Tally", "stage"]

# How long a guest may take to run again somewhere, and its other copy to be gone, when all faults are over.
SETTLES_WITHIN_S: Final = 120.0
LIMITS: Final = 'outage = "6s"\ndead_peer = "1s"\nconnections = 2\nwindow = "{window}"'


class Kind(StrEnum):
    """The hypervisor of the guest that is tried."""

    EMBEDDED = "embedded"
    QEMU = "qemu"


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came of a series of trials. `most_resent_bytes` is of one trial."""

    tried: int = 0
    moved: int = 0
    stayed: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    most_resent_bytes: int = 0

    def figures(self, name: str) -> dict[str, object]:
        """Give all of it under names that begin with this one."""
        return {f"{name}_{figure}": value for figure, value in asdict(self).items()}


class TriedGuest(Protocol):
    """What a stage asks of its guest."""

    guest_id: str

    def has_machine(self, host: str) -> bool:
        """Tell whether there is a process of it on a host, running or not."""
        ...

    async def runs(self, host: str) -> bool:
        """Tell whether it runs on a host."""
        ...

    async def is_whole(self, host: str) -> bool:
        """Tell whether it goes on there and finds its memory as it left it."""
        ...


class EmbeddedGuest:
    """A guest of 16 MiB, half of it noise, that writes all the time."""

    def __init__(self, fleet: Fleet, spec: EmbeddedSpec) -> None:
        self.guest_id = spec.guest_id
        self._fleet = fleet

    def has_machine(self, host: str) -> bool:
        return any(self.guest_id in name for name in self._fleet.machines(host))

    async def runs(self, host: str) -> bool:
        try:
            return (await run_sync(self._fleet.describe, host, self.guest_id)).is_running
        except GuestGone:
            return False

    async def is_whole(self, host: str) -> bool:
        try:
            await self._fleet.check_runs_only_at(host, self.guest_id)
        except AssertionError:
            return False
        return True


class QemuGuest:
    """A Linux of 256 MiB that writes 10 MiB/s, and checks what it wrote."""

    def __init__(self, guests: QemuGuests, spec: QemuSpec) -> None:
        self.guest_id = spec.guest_id
        self._guests = guests
        self._spec = spec

    def has_machine(self, host: str) -> bool:
        return self._guests.pid(host, self._spec) is not None

    async def runs(self, host: str) -> bool:
        try:
            return await self._guests.state(host, self._spec) == "running"
        except (QemuError, OSError):
            return False  # it ends just now

    async def is_whole(self, host: str) -> bool:
        try:
            await self._guests.check_runs(host, self._spec)
        except AssertionError:
            return False
        return True


class Stage:
    """One guest, `home` now; every trial moves it to the other host while something fails."""

    def __init__(self, processes: Processes, made: dict[str, Network], guest: TriedGuest) -> None:
        self.processes = processes
        self.networks = made
        self.guest = guest
        self.home = HOSTS[0]
        self.tally = Tally()
        self._was_doubled = False

    @property
    def away(self) -> str:
        """The host that the guest is not on."""
        return next(host for host in HOSTS if host != self.home)

    @asynccontextmanager
    async def trial(self) -> AsyncIterator[None]:
        """Begin a move; the block does the mischief, and mends it. Then count what there is."""
        self._was_doubled = False
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._look_for_two)
            # The agent that is asked may die of it: the order stands when it is in its journal, and not before.
            with contextlib.suppress(TransportError):
                await self.processes.fleet.start(self.guest.guest_id, self.home, self.away, audit=True)
            yield
            await self._count()
            tasks.cancel_scope.cancel()

    async def _look_for_two(self) -> None:
        one, other = HOSTS
        async for _ in looks(LOOK_EVERY_S):
            # It ran at one end before and after it was seen to run at the other: both at once.
            if (
                await self.guest.runs(one)
                and await self.guest.runs(other)
                and await self.guest.runs(one)
                and await self.guest.runs(other)
            ):
                self._was_doubled = True

    async def _count(self) -> None:
        tally, source = self.tally, self.home
        view = await self._ended(source)
        homes = await self._settled()
        report = view.report if view else None
        tally.tried += 1
        tally.doubled += self._was_doubled or len(homes) > 1
        tally.lost += not homes
        if len(homes) == 1:
            self.home = homes[0]
            tally.moved += self.home != source
            tally.stayed += self.home == source
            tally.wrong += not await self.guest.is_whole(self.home) or _differs(report)
        if report is not None:
            tally.most_resent_bytes = max(tally.most_resent_bytes, report.resent_bytes)

    async def rests(self, host: str) -> bool:
        """Tell whether nothing is under way with the guest on a host; False when its agent is down."""
        try:
            return all(view.has_ended for view in await self._jobs(host))
        except TransportError:
            return False

    async def _jobs(self, host: str) -> list[JobView]:
        listed = await self.processes.fleet.ask(host, ListJobs())
        jobs = listed.jobs if isinstance(listed, JobList) else ()
        return [view for view in jobs if view.guest_id == self.guest.guest_id]

    async def _ended(self, host: str) -> JobView | None:
        """Wait until a host does nothing more with the guest; give its last job, if it ever had one."""
        with anyio.move_on_after(SETTLES_WITHIN_S):
            async for _ in looks(LOOK_EVERY_S):
                if await self.rests(host):
                    break
        views = await self._jobs(host)
        return views[-1] if views else None

    async def _settled(self) -> list[str]:
        """Wait until one copy runs and there is no other machine; give where it runs, whatever there is in the end."""
        deadline_s = time.monotonic() + SETTLES_WITHIN_S
        homes: list[str] = []
        async for _ in looks(LOOK_EVERY_S):
            homes = [host for host in HOSTS if await self.guest.runs(host)]
            machines = [host for host in HOSTS if self.guest.has_machine(host)]
            if (len(homes) == 1 and machines == homes) or time.monotonic() > deadline_s:
                break
        return homes


def _differs(report: Report | None) -> bool:
    """Tell whether a move that is complete brought other RAM there than was here."""
    return (
        report is not None
        and report.phase is Phase.COMPLETE
        and report.source_digest is not None
        and report.source_digest != report.destination_digest
    )


@asynccontextmanager
async def stage(
    kind: Kind, event_loop: str, *, has_networks: bool, window: str = "4MiB"
) -> AsyncIterator[Stage]:
    """Two agents on this event loop, and a guest of this kind on the first host; a network before each, or none."""
    limits, fronts = LIMITS.format(window=window), FRONTS if has_networks else {}
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        guest: TriedGuest
        if kind is Kind.EMBEDDED:
            processes = stack.enter_context(running_processes(folder, event_loop, limits, fronts=fronts))
            guest = EmbeddedGuest(
                processes.fleet,
                processes.fleet.start_guest(
                    HOSTS[0],
                    ram_bytes=16 << 20,
                    fill_bytes=8 << 20,
                    content=Content.INCOMPRESSIBLE,
                    dirty_bytes_per_s=4 << 20,
                    working_set_bytes=1 << 20,
                ),
            )
        else:
            processes, guests = stack.enter_context(qemu_processes(folder, event_loop, limits, fronts=fronts))
            spec = guests.spec(
                memories=(MemorySpec(name="ram0", size_bytes=256 << 20),),
                append="console=ttyS0 quiet -- set=16 rate=10",
            )
            await guests.start(HOSTS[0], spec)
            guest = QemuGuest(guests, spec)
        fleet = processes.fleet
        ports: dict[str, tuple[int, ...]] = {
            host: (fleet.control_ports[host], fleet.data_ports[host]) for host in fronts
        }
        async with networks(ports) as made:
            yield Stage(processes, made, guest)
