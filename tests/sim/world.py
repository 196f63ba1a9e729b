"""Hosts, guests, agents, links and storage in virtual time, with seeded faults; the theorem is checked at every change.

The procedures, the session, the planner, the tables of moves, the journals and the recovery are the real ones; what
surrounds them is made of the pieces of `tests.migrate.world`. Runs on trio's MockClock alone: everything in here that
waits, waits in virtual time, and worker threads are replaced by calls, because an autojumping clock would jump while
a thread works.

Tasks: one per guest that moves it again and again, one per link that breaks and mends it, one per agent that starts it
again (`tests.sim.agents`) and up to two that end it, and those of the agents; all end with `World.run`.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio
import anyio.abc

from agents.api import Move
from agents.host.jobs import Job
from agents.metrics import Direction
from migrate.errors import SetupRefused
from migrate.facts import DiskFacts
from migrate.phases import Phase
from migrate.plan import OnTimeout
from tests.migrate.world import FACTS, PAGES, FakeStorage
from tests.sim.agents import SimAgent, settings_of
from tests.sim.faults import DEAD_PEER_S, OUTAGE_S, Faults, Outcome, TheoremBroken
from tests.sim.guests import Memory, SimGuest, SimHypervisor
from tests.sim.links import Link, SimReceiver
from tests.sim.lives import LIFE, Life

__all__ = ["World"]

MIGRATION_ENDS_WITHIN_S: Final = 3600.0
# When nothing fails any more: silent sources are given up, storage is asked again, and moves that go on end.
SETTLES_WITHIN_S: Final = 20 * (OUTAGE_S + DEAD_PEER_S)
LOOK_EVERY_S: Final = 0.5
# How many there are of each, at least and at most; moves of each guest.
HOSTS: Final = (2, 6)
GUESTS: Final = (1, 8)
MOVES: Final = (2, 4)


class World:
    """Guests on hosts, some of each; `run` moves each guest several times and checks what is left."""

    tasks: anyio.abc.TaskGroup

    def __init__(self, seed: int, faults: Faults, rng: random.Random, folder: Path) -> None:
        self.rng = rng
        self.faults = faults
        hosts, guests, moves = rng.randint(*HOSTS), rng.randint(*GUESTS), rng.randint(*MOVES)
        self.outcome = Outcome(seed=seed, hosts=hosts, guests=guests)
        self.names = [f"host-{number}" for number in range(hosts)]
        self.hosts = {name: SimHypervisor(self, name) for name in self.names}
        self.agents: dict[str, SimAgent] = {}
        for name in self.names:
            (folder / name).mkdir()
            self.agents[name] = SimAgent(self, name, settings_of(name, self.names, folder / name))
        self.files: dict[str, bytes] = {}
        self.records: dict[str, FakeStorage] = {}
        self.memories: dict[str, Memory] = {}
        self.ports: dict[int, SimReceiver] = {}
        self.storage_is_down = False
        self.settling = anyio.Event()
        # Asked for by the fakes that these hosts are made of; here both are chances of each opportunity.
        self.destination_refuses_to_resume = self.spoils_ram = False
        self._found: Exception | None = None
        # By host and guest: why the attempt that was last made of a move was rolled back before its first page.
        self._given_up: dict[tuple[str, str], str] = {}
        self._moves = moves
        self._last_port = 0
        self._links = {
            frozenset((one, other)): Link() for one in self.names for other in self.names if one < other
        }
        for number in range(guests):
            self._add_guest(f"guest-{number}")

    def _add_guest(self, guest_id: str) -> None:
        disk = DiskFacts(name="disk0", path=f"/shared/{guest_id}.img", size_bytes=1 << 20, is_read_only=False)
        self.records[guest_id] = FakeStorage()
        self.memories[guest_id] = Memory()
        host = self.rng.choice(self.names)
        facts = replace(FACTS, guest_id=guest_id, name=guest_id, disks=(disk,))
        guest = SimGuest(self, host, facts, is_running=True)
        guest.rng = random.Random(self.rng.random())
        guest.write(range(0, PAGES, 2))
        guest.tracker.log.clear()
        self.hosts[host].by_id[guest_id] = guest

    # -- the theorem

    def record(self) -> None:
        """Insist, after every change, that no guest runs twice."""
        for guest_id in self.records:
            running = self.running_at(guest_id)
            if len(running) > 1:
                raise self.broken(f"{guest_id} runs on {' and '.join(running)}")

    def running_at(self, guest_id: str) -> list[str]:
        """The hosts that run a guest now."""
        return [
            name
            for name, host in self.hosts.items()
            if guest_id in host.by_id and host.by_id[guest_id].is_running
        ]

    def broken(self, sentence: str) -> TheoremBroken:
        """End the world; procedures may take the error for something that an undo step met, so it is kept here."""
        story = "\n".join(self.outcome.story[-60:])
        found = TheoremBroken(
            f"{sentence}\n{story}\nreplay: python -m tests.sim --seed {self.outcome.seed} --seeds 1"
        )
        self.found_bug(found)
        return found

    def found_bug(self, error: Exception) -> None:
        """Keep the first error that nobody may swallow, and end the world."""
        if self._found is None:
            self._found = error
            self.tasks.cancel_scope.cancel()

    def phase_changed(
        self, host: str, guest_id: str, direction: Direction, old: Phase, new: Phase, because: str
    ) -> None:
        """Hear of every change of a migration at an agent that lives."""
        self.tell(f"{host}: {direction} {guest_id} {old} -> {new}: {because}")
        if direction is not Direction.OUTGOING:
            return
        # What begins in doubt was found in a journal.
        self.outcome.in_doubt += new is Phase.IN_DOUBT and old is not Phase.SETUP
        if old is Phase.SETUP:
            self._given_up.pop((host, guest_id), None)
        is_short = self.faults == Faults.short_outages_only()
        if is_short and new is Phase.ROLLED_BACK and old in (Phase.PREFLIGHT, Phase.PRECOPY):
            # The agent may begin anew: with a session that was lost before anything was asked in it, or where a machine
            # has the device state of a stop that was left.
            self._given_up[host, guest_id] = because

    def move_ended(self, host: str, guest_id: str) -> None:
        """Hear that an agent that lives has no further attempt of a guest's move."""
        if (because := self._given_up.pop((host, guest_id), None)) is not None:
            self.broken(f"an outage shorter than {OUTAGE_S:g} s ended a move of {guest_id}: {because}")

    # -- chances

    @property
    def is_settling(self) -> bool:
        return self.settling.is_set()

    def happens(self, chance: float) -> bool:
        return not self.is_settling and self.rng.random() < chance

    def comes_at(self, life: Life, what: str) -> bool:
        """`tests.sim.lives.Death`: whether an agent dies at this step."""
        chance = self.faults.crashes_at_steps
        if what.startswith("journal"):
            chance = self.faults.crashes_at_journal
        elif "claim" in what:
            chance = self.faults.crashes_at_claims
        if not self.happens(chance):
            return False
        self.tell(f"the agent of {life.host} dies at: {what}")
        self.outcome.crashes += 1
        self.outcome.crashes_at_steps += 1
        return True

    def tears(self) -> bool:
        return self.happens(0.5)

    def tell(self, sentence: str) -> None:
        self.outcome.story.append(f"{anyio.current_time():10.3f} {sentence}")

    # -- what the others are given

    def link(self, one: str, other: str) -> Link:
        return self._links[frozenset((one, other))]

    def lose(self, link: Link) -> None:
        """Break a link now, for a while."""
        link.cut()
        self.later(2 * OUTAGE_S, _mend, link)

    def later(self, latest_s: float, call: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Do something after up to so many seconds, whoever lives then."""

        async def wait_and_call() -> None:
            LIFE.set(None)
            await anyio.sleep(delay_s)
            await call(*arguments)

        delay_s = self.rng.uniform(0.1, latest_s)
        self.tasks.start_soon(wait_and_call)

    def open_port(self, receiver: SimReceiver) -> int:
        self._last_port += 1
        self.ports[self._last_port] = receiver
        return self._last_port

    # -- one seed

    async def run(self) -> Outcome:
        """Live through the seed.

        Raises:
            TheoremBroken: with the story, and how to replay it.
        """
        started_s = anyio.current_time()
        try:
            async with anyio.create_task_group() as self.tasks:
                for agent in self.agents.values():
                    self.tasks.start_soon(agent.keep_running)
                async with anyio.create_task_group() as weather:
                    self._start_weather(weather)
                    async with anyio.create_task_group() as guests:
                        for guest_id in self.records:
                            guests.start_soon(self._live, guest_id)
                    weather.cancel_scope.cancel()
                await self._settle()
                self.tasks.cancel_scope.cancel()
        except BaseException as exc:
            if self._found is not None:
                raise self._found from exc
            raise
        if self._found is not None:
            raise self._found
        self._check_the_end()
        self.outcome.virtual_s = anyio.current_time() - started_s
        return self.outcome

    def _start_weather(self, weather: anyio.abc.TaskGroup) -> None:
        if self.faults.outages:
            for ends, link in self._links.items():
                weather.start_soon(self._break_and_mend, "-".join(sorted(ends)), link)
        if self.faults.storage_outages:
            weather.start_soon(self._fail_storage)
        for agent in self.agents.values():
            if self.faults.crash_every_s:
                weather.start_soon(self._crash, agent)
            if self.faults.stop_every_s:
                weather.start_soon(self._stop, agent)

    async def _settle(self) -> None:
        """Nothing fails any more: every guest must come to rest, and every journal to its end."""
        self.tell("nothing fails any more")
        self.settling.set()
        self.storage_is_down = False
        for link in self._links.values():
            link.mend()
        await _until(lambda: not self._unsettled(), SETTLES_WITHIN_S)
        if unsettled := self._unsettled():
            raise self.broken(f"not settled after {SETTLES_WITHIN_S:g} s: {'; '.join(unsettled)}")

    def _unsettled(self) -> list[str]:
        found = [f"{guest_id} is not at rest" for guest_id in self.records if not self._is_at_rest(guest_id)]
        for name, agent in self.agents.items():
            found += [f"{path.name} is open on {name}" for path in agent.state_dir.glob("journal/*.log")]
        return found

    def _check_the_end(self) -> None:
        for guest_id, storage in self.records.items():
            [host] = self.running_at(guest_id)
            owner = storage.records[max(storage.records)].owner if storage.records else None
            if owner not in (None, host):
                raise self.broken(f"{guest_id} runs on {host} and belongs to {owner}")
            if not self.hosts[host].by_id[guest_id].has_its_memory():
                raise self.broken(f"{guest_id} runs on {host} with RAM that is not its own")

    # -- weather

    async def _break_and_mend(self, name: str, link: Link) -> None:
        while True:
            await anyio.sleep(self.rng.expovariate(1 / 30))
            length_s = self.rng.uniform(0.01, self.faults.longest_outage_s)
            self.tell(f"link {name} is down for {length_s:.1f} s")
            self.outcome.outages += 1
            link.cut()
            await anyio.sleep(length_s)
            link.mend()
            # Long enough for one question and its answer: outages without any gap are one long outage.
            await anyio.sleep(3)

    async def _fail_storage(self) -> None:
        while True:
            await anyio.sleep(self.rng.expovariate(1 / 20))
            self.storage_is_down = True
            length_s = self.rng.uniform(0.1, 15)
            self.tell(f"the storage is down for {length_s:.1f} s")
            await anyio.sleep(length_s)
            self.storage_is_down = False

    async def _crash(self, agent: SimAgent) -> None:
        while True:
            await anyio.sleep(self.rng.expovariate(1 / self.faults.crash_every_s))
            if not agent.life.is_over:
                self.tell(f"the agent of {agent.name} dies")
                self.outcome.crashes += 1
                agent.crash()

    async def _stop(self, agent: SimAgent) -> None:
        while True:
            await anyio.sleep(self.rng.expovariate(1 / self.faults.stop_every_s))
            if agent.is_serving:
                self.tell(f"the agent of {agent.name} is stopped")
                self.outcome.stops += 1
                agent.stop()

    # -- one guest

    async def _live(self, guest_id: str) -> None:
        for _ in range(self._moves):
            await anyio.sleep(self.rng.uniform(0, 5))
            host = await self._until_at_rest(guest_id)
            to = self.rng.choice([name for name in self.names if name != host])
            await self._move(guest_id, host, to)

    async def _until_at_rest(self, guest_id: str) -> str:
        """Wait until one copy is left, runs, and no agent that lives works on it; give its host."""
        await _until(lambda: self._is_at_rest(guest_id), MIGRATION_ENDS_WITHIN_S)
        if not self._is_at_rest(guest_id):
            raise self.broken(f"{guest_id} did not come to rest in {MIGRATION_ENDS_WITHIN_S:g} s")
        return self.running_at(guest_id)[0]

    def _is_at_rest(self, guest_id: str) -> bool:
        copies = [name for name, host in self.hosts.items() if guest_id in host.by_id]
        return (
            len(copies) == 1
            and self.running_at(guest_id) == copies
            and self.agents[copies[0]].is_serving
            and not any(agent.jobs.of_guest(guest_id) for agent in self.agents.values())
        )

    async def _move(self, guest_id: str, host: str, to: str) -> None:
        rng = self.rng
        move = Move(
            guest=guest_id,
            to=to,
            downtime_limit_s=rng.choice([0.03, 0.3, 2.0]),
            timeout_s=rng.choice([0.0, 0.0, 0.0, 20.0]) if self.faults.levers else 0.0,
            # A guest that outruns its link is no outage's fault: there it is suspended, and the move goes on.
            on_timeout=rng.choice(list(OnTimeout)) if self.faults.levers else OnTimeout.SUSPEND,
            is_offline=self.happens(0.2),
        )
        guest = self.hosts[host].by_id[guest_id]
        guest.dirty_per_round = [rng.randrange(1, 300) for _ in range(rng.randrange(20))]
        self.tell(f"{guest_id} is to move: {host} to {to}, {move}")
        job = await self.agents[host].order(move)
        if job is None:
            self.tell(f"the move of {guest_id} was refused")
            return
        self.outcome.moves += 1
        async with anyio.create_task_group() as beside:
            beside.start_soon(self._pull_levers, job)
            is_there = await self._until_at_rest(guest_id) == to
            beside.cancel_scope.cancel()
        self.outcome.complete += is_there
        self.outcome.rolled_back += not is_there

    async def _pull_levers(self, job: Job) -> None:
        rng, controls, guest_id = self.rng, job.controls, job.view().guest_name
        while controls is not None and self.happens(self.faults.levers):
            await anyio.sleep(rng.expovariate(1 / 10))
            try:
                match rng.randrange(4):
                    case 0:
                        self.tell(f"the move of {guest_id} is paused")
                        controls.pause()
                        await anyio.sleep(rng.uniform(0, 30))
                        controls.resume()
                    case 1:
                        controls.set_limits(downtime_limit_s=rng.uniform(0.01, 5))
                    case 2:
                        controls.set_limits(bandwidth_bytes_per_s=rng.choice([0, 1e3, 1e5]))
                    case _:
                        if self.happens(0.3):
                            self.tell(f"the move of {guest_id} is cancelled")
                            controls.cancel()
            except SetupRefused as exc:
                self.tell(f"refused: {exc}")


async def _until(is_so: Callable[[], bool], latest_s: float) -> None:
    """Look now and then: no one event tells of guests, jobs and agents at once."""
    for _ in range(int(latest_s / LOOK_EVERY_S)):
        if is_so():
            return
        await anyio.sleep(LOOK_EVERY_S)


async def _mend(link: Link) -> None:
    link.mend()
