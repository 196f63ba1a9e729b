"""Guests and the hosts that run them: like processes of their own, they outlive their agents.

Law: a guest that starts has what it had when it was stopped, to the byte, wherever it starts; whatever else comes of
a procedure is `World.record`'s to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from memory.runs import Runs
from migrate.errors import GuestRefused, GuestUnknown
from migrate.facts import GuestFacts, HostFacts
from migrate.ports import DeviceStateSink
from tests.migrate.world import (
    CPU,
    PAGES,
    FakeGuest,
    FakeHypervisor,
    ForgetfulRam,
    SafetyWatch,
    ScriptedTracker,
)
from tests.sim.lives import step

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["Memory", "SimGuest", "SimHypervisor"]


class Memory:
    """What a guest must find, wherever it runs."""

    def __init__(self) -> None:
        self.pages = np.zeros((PAGES, 4096), np.uint8)
        self.state = b"registers"


class _Tracker(ScriptedTracker):
    """A dirty log that its agent takes along when it dies: nobody else's harvest is disturbed."""

    def harvest(self) -> Runs:
        step()
        return super().harvest()

    def start(self) -> None:
        step()
        super().start()

    def stop(self) -> None:
        step()
        super().stop()


class SimGuest(FakeGuest):
    """A machine on one host: the guest, or one that waits for it and has never run."""

    def __init__(self, world: World, host: str, facts: GuestFacts, *, is_running: bool) -> None:
        super().__init__(cast(SafetyWatch, world), host, facts, is_running=is_running)
        self.tracker = _Tracker(self)
        self.has_run = is_running
        self._sim = world
        self._memory = world.memories[facts.guest_id]

    @property
    def _is_there(self) -> bool:
        return self._sim.hosts[self.host].by_id.get(self.facts.guest_id) is self

    def write(self, gfns: Sequence[int]) -> None:
        super().write(gfns)
        gfns = list(gfns)
        self._memory.pages[gfns] = self.ram.pages[gfns]
        self._memory.state = self.state = self.rng.randbytes(8)

    def live_on(self) -> None:
        """Write something, as a guest does whose agent is away."""
        if self.is_running:
            self.write(self.rng.sample(range(PAGES), self.rng.randrange(1, 30)))

    def has_its_memory(self) -> bool:
        return self.state == self._memory.state and bool(np.array_equal(self.ram.pages, self._memory.pages))

    def _reach(self, what: str) -> None:
        step(f"before {what} of {self.facts.guest_id}")
        if not self._is_there:
            raise GuestUnknown(f"{self.facts.guest_id} has ended on {self.host}")

    async def prepare_switchover(self) -> None:
        step()

    async def pause(self) -> float:
        self._reach("stop")
        await super().pause()
        step(f"after stop of {self.facts.guest_id}")
        return 0.0

    async def resume(self) -> None:
        self._reach("start")
        if not self.has_run and self._sim.happens(self._sim.faults.refused_resumes):
            raise GuestRefused("the machine does not start")
        if not self.is_running and not self.has_its_memory():
            raise self._sim.broken(
                f"{self.facts.guest_id} starts on {self.host} with RAM that is not its own"
            )
        self.has_run = True
        await super().resume()
        step(f"after start of {self.facts.guest_id}")

    async def save_device_state(self, send: DeviceStateSink) -> None:
        self._reach("saving")
        send(self.state)

    async def load_device_state(self, state: bytes) -> None:
        self._reach("loading")
        self.state = state

    async def destroy(self) -> None:
        self._reach("end")
        await super().destroy()
        step(f"after end of {self.facts.guest_id}")

    async def release(self) -> None:
        step()


class SimHypervisor(FakeHypervisor):
    """Guests of one host. A machine that never ran is found by a restarted agent, and is no guest yet."""

    def __init__(self, world: World, host: str) -> None:
        super().__init__(cast(SafetyWatch, world), host)
        self._sim = world
        self.by_id: dict[str, SimGuest] = {}  # type: ignore[assignment]

    async def host_facts(self, guest: GuestFacts | None = None) -> HostFacts:
        step()
        return HostFacts(
            name=self.host,
            hypervisor=self.name,
            cpus=(CPU,),
            machines=("fake-1",),
            free_memory_bytes=self.free_memory_bytes,
            guest_ids=tuple(each.facts.guest_id for each in self.by_id.values() if each.has_run),
        )

    async def open_guest(self, guest_id: str) -> SimGuest:
        step()
        guest = self.by_id.get(guest_id)
        if guest is None or not guest.has_run:
            raise GuestUnknown(f"no guest {guest_id} on {self.host}")
        guest.live_on()
        return guest

    async def guests(self) -> list[GuestFacts]:
        step()
        return [guest.facts for guest in self.by_id.values() if guest.has_run]

    async def prepare_incoming(self, facts: GuestFacts) -> SimGuest:
        step(f"before a machine for {facts.guest_id}")
        if facts.guest_id in self.by_id:
            raise GuestRefused(f"{self.host} has a machine of {facts.guest_id} already")
        guest = SimGuest(self._sim, self.host, facts, is_running=False)
        guest.rng.seed(self._sim.rng.random())
        if self._sim.happens(self._sim.faults.spoiled_ram):
            guest.ram = ForgetfulRam(PAGES)
        self.by_id[facts.guest_id] = guest
        step(f"after a machine for {facts.guest_id}")
        return guest

    async def find_incoming(self, guest_id: str) -> SimGuest | None:
        step()
        guest = self.by_id.get(guest_id)
        return None if guest is None or guest.has_run else guest
