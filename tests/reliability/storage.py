"""Storage that fails at one file operation after the other, all the way through moves of a guest in memory.

Law: nothing is asserted in here: what became of the guest is looked at, and counted, as in `tests.reliability.stage`.
The storage, the journals, the procedures and the recovery are the real ones; the guest and its hosts are those of
`tests.migrate.world`, so that thousands of moves take seconds.

The fault is put between `agents.ownership.fileops` and the operating system, for both hosts at once. After it the
agents are restarted, with storage that answers, and exactly one of them must let the guest run.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final
from unittest.mock import patch

import anyio
import numpy as np

from agents.config import Settings, load_settings
from agents.host.jobs import JobTable
from agents.host.journals import LazyJournal
from agents.host.parts import HostParts
from agents.host.recovery import Recovery
from agents.metrics import AgentMetrics
from agents.ownership import fileops
from agents.ownership.files import OWNERSHIP_DIR
from agents.storage import SharedDirs
from migrate.errors import GuestUnknown
from migrate.facts import GuestFacts
from migrate.phases import TERMINAL, Phase
from tests.agents.host.fleet import HOSTS, Fleet
from tests.agents.takeover import CALLS
from tests.migrate.world import DISK, FACTS, FakeGuest, FakeHypervisor, FakeSurvey, IncomingFake, World
from tests.reliability.stage import Tally

__all__ = ["ERRNOS", "Fault", "FaultyOs", "try_storage_faults"]

ERRNOS: Final = (
    errno.ESTALE,
    errno.EINTR,
    errno.ENOSPC,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.ETIMEDOUT,
)
# Each trial writes a dozen files durably, and the disk of this machine is not what is tried.
IN_MEMORY: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None


class Fault(StrEnum):
    """What becomes of the chosen operation."""

    FAILS = "fails"
    DONE_BUT_FAILS = "done-but-fails"
    # And so does everything after it, until the agents are restarted.
    STAYS_AWAY = "stays-away"
    DONE_AND_STAYS_AWAY = "done-and-stays-away"


@dataclass
class FaultyOs:
    """`os`, whose N-th call that goes to the storage fails; `at` < 0: none does, they are counted only."""

    at: int
    errno: int = errno.EIO
    fault: Fault = Fault.FAILS
    calls: list[str] = field(default_factory=list)
    is_over: bool = False
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> object:
        original = getattr(os, name)
        return self._watched(name, original) if name in CALLS else original

    def _watched(self, name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            with self._one_at_a_time:
                number = len(self.calls)
                self.calls.append(name)
            stays_away = self.fault in (Fault.STAYS_AWAY, Fault.DONE_AND_STAYS_AWAY)
            is_after = stays_away and 0 <= self.at < number
            if self.is_over or (number != self.at and not is_after):
                return original(*arguments, **options)
            if self.fault in (Fault.DONE_BUT_FAILS, Fault.DONE_AND_STAYS_AWAY) and number == self.at:
                result = original(*arguments, **options)
                if name == "open" and isinstance(result, int):
                    os.close(result)  # nobody will
            raise OSError(self.errno, os.strerror(self.errno))

        return call

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with patch.object(fileops, "os", self):
            yield


class _Host(FakeHypervisor):
    """A host whose machines that never ran are found by a restarted agent, and are no guests yet."""

    async def open_guest(self, guest_id: str) -> FakeGuest:
        if _never_ran(self.by_id.get(guest_id)):
            raise GuestUnknown(f"no guest {guest_id} on {self.host}")
        return await super().open_guest(guest_id)

    async def guests(self) -> list[GuestFacts]:
        return [guest.facts for guest in self.by_id.values() if not _never_ran(guest)]

    async def find_incoming(self, guest_id: str) -> FakeGuest | None:
        guest = self.by_id.get(guest_id)
        return guest if _never_ran(guest) else None


def _never_ran(guest: FakeGuest | None) -> bool:
    return isinstance(guest, IncomingFake) and not guest.has_run


class _Trial:
    """One move from host-a to host-b over storage of its own, and the restart of both after it."""

    def __init__(self, folder: Path, settings: dict[str, Settings]) -> None:
        self.shared = folder / "shared"
        self.shared.mkdir(parents=True)
        (self.shared / "guest.img").write_bytes(b"")
        self._settings = {
            host: replace(of, agent=replace(of.agent, state_dir=folder / host))
            for host, of in settings.items()
        }
        self.world = world = World()
        facts = replace(FACTS, disks=(replace(DISK, path=str(self.shared / "guest.img")),))
        self._source = world.guest
        self._source.facts = facts
        world.hosts = {name: _Host(world, host) for name, host in zip("ab", HOSTS, strict=True)}
        # The guests of a world look for their host by the name that they were given.
        world.hosts["a"].by_id[FACTS.guest_id] = self._source
        world.hosts |= {host: world.hosts[name] for name, host in zip("ab", HOSTS, strict=True)}
        self._storages = {host: SharedDirs([self.shared]) for host in HOSTS}
        self._journals: dict[str, LazyJournal] = {}
        for host in HOSTS:
            self._settings[host].agent.state_dir.mkdir()
            self._journals[host] = LazyJournal(self._settings[host].agent.state_dir, "migration-1")

    async def move(self) -> Phase:
        world = self.world
        world.storages = dict(zip("ab", self._storages.values(), strict=True))  # type: ignore[arg-type]
        world.journals = dict(zip("ab", self._journals.values(), strict=True))  # type: ignore[arg-type]
        world.become(HOSTS[1])
        report = await world.migrate(host=HOSTS[0], destination=HOSTS[1])
        await world.incoming.finish()
        await world.incoming.abandon("the session ended")
        for host, phase in zip(HOSTS, (report.phase, world.incoming.phase), strict=True):
            await self._journals[host].aclose(ended=phase in TERMINAL)
        return report.phase

    async def restart(self, hosts: Sequence[str]) -> None:
        for host in hosts:
            parts = HostParts(
                settings=self._settings[host],
                hypervisors={"fake": self.world.hosts[host]},
                storage=SharedDirs([self.shared]),
                survey=FakeSurvey(),
                jobs=JobTable(),
                metrics=AgentMetrics(host, "0"),
            )
            await Recovery(parts).take_up()

    @property
    def running(self) -> list[FakeGuest]:
        return [g for name in "ab" for g in self.world.hosts[name].by_id.values() if g.is_running]

    @property
    def was_doubled(self) -> bool:
        return (True, True) in self.world.history

    def has_ram(self, guest: FakeGuest) -> bool:
        """Tell whether this is the guest, or has what it had when it was stopped."""
        return bool(np.array_equal(guest.ram.pages, self._source.ram.pages))

    async def is_owned_by_host_of(self, guest: FakeGuest) -> bool:
        """Tell whether the record names the host that the guest runs on; a move that never began has none."""
        latest = await self._storages[HOSTS[0]].latest(str(self.shared / OWNERSHIP_DIR), FACTS.guest_id)
        return latest is None or latest.owner == (HOSTS[0] if guest is self._source else HOSTS[1])

    async def litter(self) -> list[str]:
        """Give what stays of the failures when the guest's next move has ended."""
        await self._storages[HOSTS[1]].tidy(str(self.shared / OWNERSHIP_DIR), FACTS.guest_id)
        return [path.name for path in (self.shared / OWNERSHIP_DIR).glob(".trial-*")]


async def count_operations(settings: dict[str, Settings], folder: Path) -> list[str]:
    """Make a move that nothing disturbs, and give the file operations of it."""
    quiet = FaultyOs(-1)
    with quiet.in_place():
        if await _Trial(folder, settings).move() is not Phase.COMPLETE:
            raise AssertionError("the move without a fault did not end well")
    return quiet.calls


async def try_storage_faults(
    *, every: int = 1, errnos: Sequence[int] = ERRNOS
) -> tuple[Tally, dict[str, int]]:
    """Fail each `every`-th operation, and each link, in every way; give what came of it, and what else was seen.

    `misowned` are guests that run where the record does not have them, `litter` what is left after the next move.
    """
    tally, doubts = Tally(), {"in_doubt": 0, "misowned": 0, "litter": 0}
    with (
        tempfile.TemporaryDirectory(prefix="vmferry-", dir=IN_MEMORY) as name,
        patch("migrate.doubt.CLAIM_PAUSE_S", 0.0),
    ):
        folder = Path(name)
        fleet = Fleet(folder)
        fleet.issue()
        ports = dict(zip(HOSTS, (7700, 7800), strict=True))
        settings = {host: load_settings(fleet.write_config(host, ports)) for host in HOSTS}
        operations = await count_operations(settings, folder / "quiet")
        ways = [(number, fault) for number in errnos for fault in Fault]
        tries = [(at, *way) for way in ways for at in range(len(operations))]
        tries = [
            way for number, way in enumerate(tries) if number % every == 0 or operations[way[0]] == "link"
        ]
        for number, (at, code, fault) in enumerate(tries):
            trial = _Trial(folder / f"{number}", settings)
            faulty = FaultyOs(at, code, fault)
            await _try(trial, faulty, tally, doubts, HOSTS if number % 2 else HOSTS[::-1])
    return tally, doubts


async def _try(
    trial: _Trial, faulty: FaultyOs, tally: Tally, doubts: dict[str, int], order: Sequence[str]
) -> None:
    with faulty.in_place():
        phase = await trial.move()
        in_doubt = Phase.IN_DOUBT in (phase, trial.world.incoming.phase)
        doubts["in_doubt"] += in_doubt
        tally.tried += 1
        before = len(trial.running)
        faulty.is_over = True
        await trial.restart(order)
        after = trial.running
    tally.lost += (before == 0 and not in_doubt) or not after
    tally.doubled += trial.was_doubled or before > 1 or len(after) > 1
    tally.wrong += any(not trial.has_ram(guest) for guest in after)
    tally.moved += any(guest.host == HOSTS[1] for guest in after)
    tally.stayed += any(guest.host != HOSTS[1] for guest in after)
    doubts["misowned"] += any([not await trial.is_owned_by_host_of(guest) for guest in after])
    doubts["litter"] += len(await trial.litter())


if __name__ == "__main__":
    print(anyio.run(try_storage_faults))
