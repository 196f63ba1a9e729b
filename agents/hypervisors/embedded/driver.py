"""The driver: embedded guests as `migrate.ports.Hypervisor` sees them.

Law: AnyIO only; every blocking call goes to a worker thread and has a deadline there. This driver's errors leave it
as migrate's: GuestUnknown, GuestRefused. A guest is a process of its own: nothing here ends it but `destroy`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from anyio import to_thread

from agents.hypervisors.confinement import ROOT, confinement_of
from agents.hypervisors.embedded.client import Description, GuestClient, launch_guest
from agents.hypervisors.embedded.cpuid import facts_of_model
from agents.hypervisors.embedded.errors import EmbeddedError, GuestGone
from agents.hypervisors.embedded.ramfile import RAM_BLOCK, ram_layout
from agents.hypervisors.embedded.rundir import GuestPaths, clean_stale, guest_ids
from agents.hypervisors.embedded.spec import CPU_MODELS, EmbeddedSpec
from agents.hypervisors.embedded.tracking import choose_tracker
from agents.hypervisors.hostmemory import free_memory_bytes
from agents.hypervisors.inhabitants import Inhabitant
from agents.hypervisors.seen import Seen
from memory.ram import MappedRam
from memory.runs import Runs, empty_runs
from migrate.errors import GuestRefused, GuestUnknown
from migrate.facts import (
    BlockFacts,
    DiskFacts,
    GuestCpuFacts,
    GuestDemand,
    GuestFacts,
    GuestHardware,
    HostCpuFacts,
    HostFacts,
    HostHardware,
    Objection,
)
from migrate.ports import DeviceStateSink, DirtyTracker, SeenGuest
from migrate.preflight.cpufit import models_with

__all__ = ["EmbeddedHypervisor", "EmbeddedIncomingGuest", "EmbeddedRunningGuest"]

NAME: Final = "embedded"
MACHINE: Final = "embedded-1"
VCPUS: Final = 1
# Of its device state: a change that older ones cannot read is a new minor version.
VERSION: Final = "1.0"
_DISK: Final = "disk0"
_EMULATOR: Final = importlib.metadata.version("unicorn")

T = TypeVar("T")


class EmbeddedHypervisor:
    """The embedded guests of one directory.

    Args:
        guests_dir: where their sockets are; made when the first one comes.
        host_name: for the facts.
        memory_limit_bytes: how much RAM all of them together may have, or None.
        disk_dirs: below which the disks of guests from other hosts are, or None for anywhere. A peer names the file,
            and its guest writes there.
        root: where /proc and /sys are looked for.
    """

    name: Final = NAME

    def __init__(
        self,
        guests_dir: Path,
        host_name: str,
        *,
        memory_limit_bytes: int | None = None,
        disk_dirs: Sequence[Path] | None = None,
        root: Path = ROOT,
    ) -> None:
        self._guests_dir = guests_dir.absolute()
        self._host_name = host_name
        self._memory_limit_bytes = memory_limit_bytes
        self._disk_dirs = disk_dirs
        self._root = root

    async def host_facts(self, guest: GuestFacts | None = None) -> HostFacts:
        """Give what this host can give to one more guest, whichever it is."""
        return await to_thread.run_sync(self._host_facts, guest)

    async def objections(self, facts: GuestFacts) -> tuple[Objection, ...]:
        """None: whatever an embedded guest needs is found by the checks of every guest."""
        return ()

    async def guests(self) -> list[GuestFacts]:
        """List the guests that are here; machines that wait for their state are none yet."""
        return [_facts(one) for one in await to_thread.run_sync(self._describe_all) if not one.is_incoming]

    async def inhabitants(self) -> tuple[Inhabitant, ...]:
        """Give all machines that are here, also those that wait for their state."""
        return tuple(
            Inhabitant(guest_id=one.spec.guest_id, ram_bytes=one.spec.ram_bytes, vcpus=VCPUS, pid=one.pid)
            for one in await to_thread.run_sync(self._describe_all)
        )

    async def open_guest(self, guest_id: str) -> EmbeddedRunningGuest:
        """Connect to a guest. Raises GuestUnknown, GuestRefused."""
        return await _in_thread(lambda: self._open(guest_id))

    async def inspect_guest(self, guest_id: str) -> SeenGuest:
        """As `open_guest`; one that has faulted is described nevertheless."""
        try:
            return await self.open_guest(guest_id)
        except GuestRefused as exc:
            described = await _in_thread(
                lambda: self._describe(GuestPaths.of_guest(self._guests_dir, guest_id))
            )
            return Seen(replace(_facts(described), blockers=(str(exc),)))

    async def prepare_incoming(self, facts: GuestFacts) -> EmbeddedIncomingGuest:
        """Start an empty machine for this guest. Raises GuestRefused."""
        return await _in_thread(lambda: self._prepare(facts))

    async def find_incoming(self, guest_id: str) -> EmbeddedIncomingGuest | None:
        """Give the machine that waits here with its device state loaded. Raises GuestRefused."""
        return await _in_thread(lambda: self._find_incoming(guest_id))

    def _host_facts(self, guest: GuestFacts | None) -> HostFacts:
        here = self._describe_all()
        return HostFacts(
            name=self._host_name,
            hypervisor=NAME,
            cpus=tuple(facts_of_model(model) for model in CPU_MODELS),
            machines=(MACHINE,),
            free_memory_bytes=self._free_memory_bytes(here),
            guest_ids=tuple(one.spec.guest_id for one in here if not one.is_incoming),
            hardware=HostHardware(
                version=VERSION,
                guest_names=tuple(
                    sorted(
                        one.spec.name for one in here if guest is None or one.spec.guest_id != guest.guest_id
                    )
                ),
            ),
            cpu_host=HostCpuFacts(version=_EMULATOR, features=_all_features()),
        )

    def _free_memory_bytes(self, here: list[Description]) -> int:
        free_bytes = free_memory_bytes()
        if self._memory_limit_bytes is not None:
            taken_bytes = sum(one.spec.ram_bytes for one in here)
            free_bytes = max(min(free_bytes, self._memory_limit_bytes - taken_bytes), 0)
        return free_bytes

    def _describe_all(self) -> list[Description]:
        described: list[Description] = []
        for guest_id in guest_ids(self._guests_dir):
            # One that ends while we look is not here.
            with contextlib.suppress(EmbeddedError):
                described.append(self._describe(GuestPaths.of_guest(self._guests_dir, guest_id)))
        return described

    def _describe(self, paths: GuestPaths) -> Description:
        try:
            client = GuestClient(paths.socket)
        except GuestGone:
            clean_stale(paths)
            raise
        with contextlib.closing(client):
            return client.describe()

    def _open(self, guest_id: str) -> EmbeddedRunningGuest:
        if guest_id not in guest_ids(self._guests_dir):
            raise GuestUnknown(f"no embedded guest {guest_id!r:.60} on {self._host_name}")
        paths = GuestPaths.of_guest(self._guests_dir, guest_id)
        try:
            client = GuestClient(paths.socket)
        except GuestGone as exc:
            clean_stale(paths)
            raise GuestUnknown(f"the embedded guest {guest_id} on {self._host_name} has ended") from exc
        with _closed_on_error(client):
            described = client.describe()
            if described.is_incoming:
                raise GuestUnknown(f"guest {guest_id} is still on its way to {self._host_name}")
            if described.state == "faulted":
                raise GuestRefused(f"guest {described.spec.name} cannot be moved: {described.fault}")
            ram = _map_ram(client, described.spec)
            facts = replace(_facts(described), confinement=confinement_of(described.pid, self._root))
            return EmbeddedRunningGuest(client, paths, facts, ram)

    def _find_incoming(self, guest_id: str) -> EmbeddedIncomingGuest | None:
        if guest_id not in guest_ids(self._guests_dir):
            return None
        paths = GuestPaths.of_guest(self._guests_dir, guest_id)
        try:
            client = GuestClient(paths.socket)
        except GuestGone:
            clean_stale(paths)
            return None
        with _closed_on_error(client):
            described = client.describe()
            if described.state == "loaded":
                return EmbeddedIncomingGuest(client, paths, _map_ram(client, described.spec))
        client.close()
        return None

    def _prepare(self, facts: GuestFacts) -> EmbeddedIncomingGuest:
        spec = EmbeddedSpec.from_bytes(facts.spec)
        if facts.hypervisor != NAME or facts.guest_id != spec.guest_id or facts.ram_bytes != spec.ram_bytes:
            raise GuestRefused(
                "the guest's facts and its spec do not fit each other; update the agents on both hosts"
            )
        if spec.disk_path is not None and not self._may_be_disk(spec.disk_path):
            raise GuestRefused(
                f"the guest's disk {spec.disk_path} is in none of the directories that {self._host_name} allows: "
                "move it below one of [storage] shared_dirs, or add its directory there"
            )
        if spec.disk_path is not None and not os.access(spec.disk_path, os.R_OK | os.W_OK):
            raise GuestRefused(
                f"{self._host_name} cannot open the guest's disk {spec.disk_path}: mount the shared storage there"
            )
        free_bytes = self._free_memory_bytes(self._describe_all())
        if spec.ram_bytes > free_bytes:
            raise GuestRefused(
                f"{self._host_name} has {free_bytes} bytes of memory free and the guest needs {spec.ram_bytes}; "
                "move another guest away or choose another host"
            )
        client = launch_guest(spec, self._guests_dir, is_incoming=True)
        with _closed_on_error(client):
            paths = GuestPaths.of_guest(self._guests_dir, spec.guest_id)
            return EmbeddedIncomingGuest(client, paths, _map_ram(client, spec))

    def _may_be_disk(self, path: str) -> bool:
        if self._disk_dirs is None:
            return True
        resolved = Path(os.path.realpath(path))
        return any(resolved.is_relative_to(os.path.realpath(folder)) for folder in self._disk_dirs)


class _OpenGuest:
    """What both ends of a move have in hand: a connection to the guest's process, and its RAM."""

    def __init__(self, client: GuestClient, paths: GuestPaths, ram: MappedRam) -> None:
        self._client = client
        self._paths = paths
        self._ram = ram
        self._is_open = True

    @property
    def ram(self) -> MappedRam:
        return self._ram

    async def resume(self) -> None:
        """Let it run. May be called twice. Raises GuestRefused."""
        await _in_thread(self._client.resume)

    async def destroy(self) -> None:
        """End it for good; its RAM is free when this returns. May be called twice."""
        await _in_thread(self._destroy)

    async def release(self) -> None:
        """Let go of it and leave it as it is. May be called twice."""
        await to_thread.run_sync(self._release)

    def _destroy(self) -> None:
        if self._is_open:
            # It may have ended before us, which is what we want.
            with contextlib.suppress(EmbeddedError):
                self._client.quit()
            try:
                self._client.await_end()
            finally:
                self._release()
                clean_stale(self._paths)

    def _release(self) -> None:
        if self._is_open:
            self._is_open = False
            self._client.close()
            self._ram.close()


class EmbeddedRunningGuest(_OpenGuest):
    """A guest at the source."""

    def __init__(self, client: GuestClient, paths: GuestPaths, facts: GuestFacts, ram: MappedRam) -> None:
        super().__init__(client, paths, ram)
        self._facts = facts
        self._tracker = choose_tracker(client, ram.total_pages)

    @property
    def facts(self) -> GuestFacts:
        return self._facts

    @property
    def tracker(self) -> DirtyTracker:
        return self._tracker

    @property
    def discards(self) -> bool:
        return False

    def discarded_runs(self, among: Runs) -> Runs:
        """None: it has no balloon."""
        return empty_runs()

    async def drain(self) -> None:
        """Its devices write to RAM only while its CPU stands between two slices."""

    async def pause(self) -> float:
        """Stop its CPU between two slices; give the seconds since it was asked to. May be called twice."""
        asked_s = time.perf_counter()
        await _in_thread(self._client.pause)
        return time.perf_counter() - asked_s

    async def prepare_switchover(self) -> None:
        """Nothing can be done beforehand."""

    async def pause_for_switchover(self, send: DeviceStateSink) -> float:
        """As `pause`: its device state is some KiB, and none of it can be had before the stop."""
        return await self.pause()

    async def save_device_state(self, send: DeviceStateSink) -> None:
        """Send everything of the paused machine that is not RAM."""
        send(await _in_thread(self._client.save_state))

    def _release(self) -> None:
        if self._is_open:
            self._tracker.stop()
        super()._release()


class EmbeddedIncomingGuest(_OpenGuest):
    """An empty machine at the destination. It ends with this connection until its device state is loaded."""

    async def load_device_state(self, state: bytes) -> None:
        """Load it after the last page. Raises GuestRefused."""
        await _in_thread(lambda: self._client.load_state(state))


async def _in_thread(call: Callable[[], T]) -> T:
    """Run a blocking call of this driver, and give its errors as migrate's."""
    try:
        return await to_thread.run_sync(call)
    except EmbeddedError as exc:
        raise GuestRefused(str(exc)) from exc


@contextlib.contextmanager
def _closed_on_error(client: GuestClient) -> Iterator[None]:
    try:
        yield
    except BaseException:
        client.close()
        raise


def _map_ram(client: GuestClient, spec: EmbeddedSpec) -> MappedRam:
    fd = client.ram_fd()
    try:
        return MappedRam(fd, ram_layout(spec.ram_bytes))
    finally:
        os.close(fd)


def _facts(described: Description) -> GuestFacts:
    spec = described.spec
    return GuestFacts(
        guest_id=spec.guest_id,
        name=spec.name,
        hypervisor=NAME,
        is_running=described.is_running,
        machine=MACHINE,
        blocks=(BlockFacts(name=RAM_BLOCK, size_bytes=spec.ram_bytes),),
        cpu=facts_of_model(spec.cpu_model),
        disks=_disks(spec),
        spec=spec.to_bytes(),
        demand=GuestDemand(vcpus=VCPUS),
        hardware=GuestHardware(version=VERSION),
        cpu_run=_cpu_run(spec.cpu_model),
    )


@functools.cache
def _cpu_run(cpu_model: str) -> GuestCpuFacts:
    alternatives = models_with(facts_of_model(cpu_model).features, map(facts_of_model, CPU_MODELS))
    return GuestCpuFacts(version=_EMULATOR, alternatives=alternatives)


@functools.cache
def _all_features() -> tuple[str, ...]:
    return tuple(sorted({name for model in CPU_MODELS for name in facts_of_model(model).features}))


def _disks(spec: EmbeddedSpec) -> tuple[DiskFacts, ...]:
    if spec.disk_path is None:
        return ()
    try:
        size_bytes = os.stat(spec.disk_path).st_size
    except OSError:
        size_bytes = 0
    return (
        DiskFacts(name=_DISK, path=spec.disk_path, size_bytes=size_bytes, is_read_only=False, format="raw"),
    )
