"""What a restarted agent makes of each journal, with real journals, real records and guests that only say who runs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from agents.api import Move, Resolution
from agents.config import load_settings
from agents.host.jobs import Job, JobTable
from agents.host.orders import MAX_ATTEMPTS, Order
from agents.host.parts import HostParts
from agents.host.recovery import Recovery
from agents.journal import JournalEntry, JournalFile, list_open
from agents.metrics import AgentMetrics
from agents.storage import SharedDirs
from migrate.errors import InDoubt, SetupRefused
from migrate.facts import GuestFacts
from migrate.ownership import Ownership, next_generation
from migrate.phases import Phase
from tests.agents.host.fleet import Fleet
from tests.migrate.world import FACTS, FakeGuest, FakeHypervisor, FakeSurvey, World
from tests.waiting import until

pytestmark = pytest.mark.anyio

JOB = "a" * 32
OWNED = Ownership(guest_id=FACTS.guest_id, generation=1, owner="host-a", migration_id="earlier")


class Here:
    """One host after a restart: `host-a` was the source, `host-b` the destination."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        fleet = Fleet(folder)
        fleet.issue()
        self.settings = load_settings(fleet.write_config(name, {"host-a": 7700, "host-b": 7800}))
        self.storage = SharedDirs([fleet.shared])
        self.directory = fleet.shared / ".vmferry"
        self.hypervisor = LoadedHypervisor(World(), name)
        self.jobs = JobTable()
        self.recovery = Recovery(
            HostParts(
                settings=self.settings,
                hypervisors={"fake": self.hypervisor},
                storage=self.storage,
                survey=FakeSurvey(),
                jobs=self.jobs,
                metrics=AgentMetrics(name, "0"),
            )
        )

    def journal(self, *steps: str, order: Order | None = None, newest: Ownership = OWNED) -> None:
        """Leave a journal that did not end; `order` is what an operator had asked for.

        Of several "started", the last one saw the `newest` record.
        """
        self.settings.agent.state_dir.mkdir(parents=True)
        file = JournalFile.create(self.settings.agent.state_dir, JOB)
        seen = OWNED if steps.count("started") > 1 else newest
        for step in steps:
            facts = self._facts(step, seen) if step in ("started", "prepared") else {}
            seen = newest
            if step == "started" and order is not None:
                facts["order"] = order.to_bytes()
            file.append(JournalEntry(step=step, at_s=time.time(), facts=facts))
        file.close(ended=False)

    def _facts(self, step: str, seen: Ownership) -> dict[str, str | int | bytes | bool]:
        return {
            "guest_id": FACTS.guest_id,
            "guest_name": FACTS.name,
            "destination" if step == "started" else "source": "host-b" if step == "started" else "host-a",
            "generation": seen.generation,
            "ownership_dir": str(self.directory),
        }

    async def own(self, record: Ownership) -> None:
        """Make a record, and the one before it."""
        await self.storage.claim(str(self.directory), OWNED)
        await self.storage.claim(str(self.directory), record)

    def guest(self, *, is_loaded: bool = False) -> FakeGuest:
        """Leave a guest that stands still; `is_loaded` is one that has never run here."""
        guest = FakeGuest(self.hypervisor.world, self.hypervisor.host, FACTS, is_running=False)
        (self.hypervisor.loaded if is_loaded else self.hypervisor.by_id)[FACTS.guest_id] = guest
        self.hypervisor.world.hosts[self.hypervisor.host] = self.hypervisor
        return guest

    @property
    def job(self) -> Job:
        return self.jobs.get(JOB)

    @property
    def open_journals(self) -> int:
        return len(list_open(self.settings.agent.state_dir))


class LoadedHypervisor(FakeHypervisor):
    """Remembers machines that have their device state and never ran."""

    def __init__(self, world: World, host: str) -> None:
        super().__init__(world, host)
        self.loaded: dict[str, FakeGuest] = {}

    async def guests(self) -> list[GuestFacts]:
        return []

    async def find_incoming(self, guest_id: str) -> FakeGuest | None:
        return self.loaded.get(guest_id)


def runs(guest: FakeGuest) -> bool:
    return guest.is_running


def runs_at(owner: str) -> Ownership:
    """What the destination of the move says after its claim: that the guest runs there, or is given back."""
    return next_generation(claim_of(owner), owner, JOB)


def claim_of(owner: str) -> Ownership:
    return next_generation(OWNED, owner, JOB)


async def until_settled(job: Job) -> None:
    while job.phase is Phase.IN_DOUBT:
        await anyio.lowlevel.checkpoint()


async def test_a_source_that_never_came_to_commit_lets_its_guest_run(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-a")
    here.journal("started")
    guest = here.guest()
    await here.recovery.take_up()
    assert here.job.phase is Phase.ROLLED_BACK
    assert guest.is_running
    assert here.open_journals == 0


async def test_a_source_in_doubt_takes_a_guest_that_nobody_has_taken(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-a")
    here.journal("started", "commit-may-leave")
    await here.storage.claim(str(here.directory), OWNED)
    guest = here.guest()
    await here.recovery.take_up()
    assert here.job.phase is Phase.ROLLED_BACK
    assert guest.is_running
    assert await here.storage.latest(str(here.directory), FACTS.guest_id) == claim_of("host-a")


async def test_a_source_that_saw_a_newer_record_asks_for_what_comes_after_it(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-a")
    here.journal("started", "started", "commit-may-leave", newest=claim_of("host-a"))
    await here.own(claim_of("host-a"))
    guest = here.guest()
    await here.recovery.take_up()
    assert guest.is_running
    latest = await here.storage.latest(str(here.directory), FACTS.guest_id)
    assert latest == next_generation(claim_of("host-a"), "host-a", JOB)


async def test_a_source_in_doubt_ends_its_copy_of_a_guest_that_was_taken(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-a")
    here.journal("started", "commit-may-leave")
    await here.own(claim_of("host-b"))
    await here.own(runs_at("host-b"))
    guest = here.guest()
    await here.recovery.take_up()
    assert here.job.phase is Phase.COMPLETE
    assert not guest.is_running
    assert here.hypervisor.by_id == {}
    assert here.open_journals == 0


async def test_a_source_in_doubt_keeps_its_copy_until_the_destination_has_said_how_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrate.doubt.CLAIM_PAUSE_S", 0.0)
    monkeypatch.setattr("agents.host.recovery.SETTLE_EVERY_S", 0.01)
    here = Here(tmp_path, "host-a")
    here.journal("started", "commit-may-leave")
    await here.own(claim_of("host-b"))
    guest = here.guest()
    await here.recovery.take_up()
    # It may not have started there, and may be given back: this is then the last copy.
    assert here.job.has_ended
    assert not runs(guest)
    assert "may be the last one" in (await here.recovery.resolve(here.job, act=False)).verdict
    resolve, tried = here.recovery.resolve, []

    async def counted(job: Job, *, act: bool) -> Resolution:
        tried.append(job)
        return await resolve(job, act=act)

    monkeypatch.setattr(here.recovery, "resolve", counted)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(here.recovery.keep_settling)
        await until(lambda: len(tried) > 2, "attempts to settle it")
        assert not runs(guest)
        await here.storage.claim(str(here.directory), runs_at("host-a"))
        with anyio.fail_after(5):
            await until_settled(here.job)
        tasks.cancel_scope.cancel()
    assert here.job.phase is Phase.ROLLED_BACK
    assert runs(guest)


async def test_a_person_who_knows_that_the_destination_is_off_takes_the_guest_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrate.doubt.CLAIM_PAUSE_S", 0.0)
    here = Here(tmp_path, "host-a")
    here.journal("started", "commit-may-leave")
    await here.own(claim_of("host-b"))
    guest = here.guest()
    await here.recovery.take_up()
    with pytest.raises(InDoubt):
        await here.recovery.resolve(here.job, act=True)
    assert "--take" in (await here.recovery.resolve(here.job, act=False)).verdict
    assert not runs(guest)
    settled = await here.recovery.resolve(here.job, act=False, take=True)
    assert (settled.is_resolved, settled.runs_on) == (True, "host-a")
    assert runs(guest)
    # The destination, when it is back after all, finds that the guest is no longer its own.
    there = Here(tmp_path / "there", "host-b")
    there.journal("prepared", "may-claim")
    await there.own(claim_of("host-b"))
    await there.storage.claim(str(there.directory), runs_at("host-a"))
    copy = there.guest()
    copy.is_running = True
    await there.recovery.take_up()
    assert there.job.phase is Phase.ROLLED_BACK
    assert not runs(copy)
    assert there.hypervisor.by_id == {}


async def test_a_guest_that_is_said_to_run_is_not_taken_back(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-b")
    here.journal("prepared", "may-claim")
    await here.own(claim_of("host-b"))
    await here.recovery.take_up()
    assert here.job.phase is Phase.IN_DOUBT
    with pytest.raises(SetupRefused, match="only the source takes a guest back"):
        await here.recovery.resolve(here.job, act=False, take=True)


async def test_storage_that_does_not_answer_leaves_a_job_that_resolve_settles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrate.doubt.CLAIM_PAUSE_S", 0.0)
    here = Here(tmp_path, "host-a")
    here.journal("started", "commit-may-leave")
    guest = here.guest()
    here.directory.write_text("a file where the directory was")
    await here.recovery.take_up()
    assert here.job.phase is Phase.IN_DOUBT
    assert not runs(guest)
    assert here.open_journals == 1
    told = await here.recovery.resolve(here.job, act=False)
    assert "cannot be read" in told.record
    assert not told.is_resolved
    with pytest.raises(InDoubt):
        await here.recovery.resolve(here.job, act=True)
    here.directory.unlink()
    await here.storage.claim(str(here.directory), OWNED)
    told = await here.recovery.resolve(here.job, act=False)
    assert told.record.startswith("generation 1 belongs to host-a")
    assert "--act takes it for host-a" in told.verdict
    assert not runs(guest)
    settled = await here.recovery.resolve(here.job, act=True)
    assert (settled.is_resolved, settled.runs_on) == (True, "host-a")
    assert runs(guest)
    with pytest.raises(SetupRefused, match="not in doubt"):
        await here.recovery.resolve(here.job, act=True)


async def test_a_destination_that_had_claimed_runs_the_guest(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-b")
    here.journal("prepared", "may-claim")
    await here.own(claim_of("host-b"))
    guest = here.guest(is_loaded=True)
    await here.recovery.take_up()
    assert here.job.phase is Phase.COMPLETE
    assert guest.is_running
    assert await here.storage.latest(str(here.directory), FACTS.guest_id) == runs_at("host-b")


async def test_a_destination_that_had_not_claimed_leaves_nothing(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-b")
    here.journal("prepared", "may-claim")
    await here.storage.claim(str(here.directory), OWNED)
    guest = here.guest(is_loaded=True)
    await here.recovery.take_up()
    assert here.job.phase is Phase.ROLLED_BACK
    assert not guest.is_running
    # A claim of ours that comes late, because the storage hung, finds its place taken.
    assert await here.storage.latest(str(here.directory), FACTS.guest_id) == claim_of("host-a")
    assert await here.storage.claim(str(here.directory), claim_of("host-b")) == claim_of("host-a")


async def test_a_destination_that_may_have_given_the_guest_back_never_runs_it(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-b")
    here.journal("prepared", "may-claim", "may-give-back")
    await here.own(claim_of("host-b"))
    guest = here.guest(is_loaded=True)
    await here.recovery.take_up()
    assert here.job.phase is Phase.ROLLED_BACK
    assert not guest.is_running
    assert await here.storage.latest(str(here.directory), FACTS.guest_id) == runs_at("host-a")


async def test_a_destination_whose_guest_is_gone_says_where_the_last_copy_is(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-b")
    here.journal("prepared", "may-claim")
    await here.own(claim_of("host-b"))
    await here.recovery.take_up()
    assert here.job.phase is Phase.IN_DOUBT
    with pytest.raises(InDoubt, match="The stopped copy on host-a may be the last one"):
        await here.recovery.resolve(here.job, act=True)
    told = await here.recovery.resolve(here.job, act=False)
    assert "the guest belongs to host-b" in told.verdict


ORDER = Order(job="b" * 32, move=Move(guest="guest", to="host-b", downtime_limit_s=0.5))


@pytest.mark.parametrize("steps", [("started",), ("started", "commit-may-leave")])
async def test_a_move_that_was_ordered_goes_on(tmp_path: Path, steps: tuple[str, ...]) -> None:
    here = Here(tmp_path, "host-a")
    here.journal(*steps, order=ORDER)
    await here.storage.claim(str(here.directory), OWNED)
    guest = here.guest()
    (again,) = await here.recovery.take_up()
    assert again == Order(job=ORDER.job, move=ORDER.move, attempt=2, resumes=JOB)
    assert here.jobs.get(ORDER.job).phase is Phase.ROLLED_BACK
    assert guest.is_running
    assert here.open_journals == 0


async def test_a_move_that_was_being_given_up_does_not_go_on(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-a")
    here.journal("started", "rolling-back", order=ORDER)
    guest = here.guest()
    assert await here.recovery.take_up() == []
    assert guest.is_running


async def test_a_move_whose_guest_was_taken_over_does_not_go_on(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-a")
    here.journal("started", "commit-may-leave", order=ORDER)
    await here.own(claim_of("host-b"))
    here.guest()
    assert await here.recovery.take_up() == []


async def test_a_move_that_kills_the_agent_again_and_again_is_given_up(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-a")
    here.journal("started", order=replace(ORDER, attempt=MAX_ATTEMPTS))
    here.guest()
    assert await here.recovery.take_up() == []


@pytest.mark.parametrize("garbage", [b"x", b"\xc1", ORDER.to_bytes()[:-1], 7])
def test_an_order_of_another_release_is_none(garbage: object) -> None:
    assert Order.from_bytes(garbage) is None


def test_an_order_is_read_as_it_was_written() -> None:
    assert Order.from_bytes(ORDER.to_bytes()) == ORDER


async def test_a_journal_that_ended_is_nobodys_doubt(tmp_path: Path) -> None:
    here = Here(tmp_path, "host-a")
    here.journal("started", "commit-may-leave", "complete")
    await here.recovery.take_up()
    assert list(here.jobs) == []
    assert here.open_journals == 0


@pytest.mark.parametrize("shows", [None, 1])
async def test_a_destination_whose_storage_is_another_one_ends_nothing(
    tmp_path: Path, shows: int | None
) -> None:
    here = Here(tmp_path, "host-b")
    here.journal("prepared", "may-claim")
    if shows is not None:
        await here.storage.claim(str(here.directory), replace(OWNED, guest_id="somebody-else"))
    guest = here.guest(is_loaded=True)
    await here.recovery.take_up()
    assert here.job.phase is Phase.IN_DOUBT
    assert here.hypervisor.loaded[FACTS.guest_id] is guest
    assert here.open_journals == 1
