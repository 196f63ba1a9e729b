"""A link that fails while the guest stands still: the guest runs on where it was, and so does its pre-copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import anyio
import pytest

from memory.runs import Runs, pages_in
from migrate.messages import MAX_LOAD_WAIT_S, Arm, Load, Loaded
from migrate.phases import Phase
from migrate.plan import Policy
from migrate.ports import PayloadProducer
from migrate.source import MAX_STOPS
from tests.migrate.world import FACTS, PAGES, InMemorySender, World
from tests.waiting import delay
from transport.errors import PeerRefused

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests stand still for 200 ms at most."""
    monkeypatch.setattr("migrate.source.STOP_BUDGET_S", 0.2)
    monkeypatch.setattr("migrate.source.STOP_BUDGET_LIMITS", 0)


POLICY = Policy(downtime_limit_s=0.3)
OnGiven = Callable[[int], None] | None


def stall_at_stops(world: World, stops: int) -> list[bool]:
    """Let the link stall at the first `stops` stops, and be well again when the guest runs; note who ran then."""
    ran: list[bool] = []
    stopped: list[bool] = []

    def stop() -> None:
        assert world.sender is not None
        stopped.append(world.guest.is_running)
        if len(ran) < stops:
            world.sender.stall()

    def go_on() -> None:
        if stopped and world.sender is not None:
            world.sender.go_on()
            ran.append(world.guest.is_running)
            # It has work to do, so that what it wrote in the last stop's round is not all there is.
            world.guest.dirty_per_round = [50, 20, 5]

    world.watchers["a"].at_phase[Phase.STOP] = stop
    world.watchers["a"].at_phase[Phase.PRECOPY] = go_on
    return ran


@pytest.mark.parametrize("stops", [1, 3])
async def test_the_precopy_goes_on_from_what_the_destination_has(stops: int) -> None:
    world = World()
    ran = stall_at_stops(world, stops)
    armed: list[object] = []
    handle = world.incoming.handle

    async def note(request: object) -> object:
        if isinstance(request, Arm):
            armed.append(request)
        return await handle(request)

    world.incoming.handle = note  # type: ignore[method-assign]
    # The last round is never empty: some pages are under way each time that the link stalls.
    world.guest.dirty_per_round = [200, 60, 20, 9, 9, 9]
    report = await world.migrate(POLICY)
    assert report.phase is Phase.COMPLETE, report.error
    phases = [new for _, new, _ in world.watchers["a"].changes]
    assert phases.count(Phase.STOP) == stops + 1
    assert ran == [True] * stops
    assert len(armed) == stops + 1
    assert report.source_digest == report.destination_digest
    assert world.hosts["b"].by_id[FACTS.guest_id].state == b"registers"
    assert (True, True) not in world.history
    said = next(because for _, new, because in world.watchers["a"].changes if because.endswith("copied on"))
    assert "stood still for 0.2 s" in said


async def test_pages_that_were_lost_with_a_stop_that_was_left_are_no_base() -> None:
    world = World()
    gather, stalled = world.guest.ram.gather, list[int]()

    def gather_and_stall(runs: Runs, out: memoryview) -> int:
        # What is copied now is under way when the link stalls, and never arrives.
        if world.sender is not None and world.watchers["a"].changes[-1][1] is Phase.STOP and not stalled:
            stalled.append(pages_in(runs))
            world.sender.stall()
        return gather(runs, out)

    def go_on() -> None:
        if stalled and world.sender is not None:
            world.sender.go_on()

    world.guest.ram.gather = gather_and_stall  # type: ignore[method-assign]
    world.watchers["a"].at_phase[Phase.PRECOPY] = go_on
    # All of them: each page of the last round has been sent before.
    world.guest.dirty_per_round = [PAGES, PAGES, 60, 20, 9, 9, 9, 9]
    report = await world.migrate(POLICY)
    assert report.phase is Phase.COMPLETE, report.error
    assert stalled
    assert report.source_digest == report.destination_digest


async def test_a_device_state_of_a_stop_that_was_left_is_void() -> None:
    world = World()
    stall_at_stops(world, 1)

    stop = world.watchers["a"].at_phase[Phase.STOP]

    def both() -> None:
        world.guest.state += b"+"
        stop()

    world.watchers["a"].at_phase[Phase.STOP] = both
    report = await world.migrate(POLICY)
    assert report.phase is Phase.COMPLETE, report.error
    assert world.hosts["b"].by_id[FACTS.guest_id].state == b"registers++"


async def test_load_does_not_wait_for_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round trip less of a guest that stands still."""
    world = World()
    guest, loads, send_all = world.guest, note_loads(world), InMemorySender.send_all

    async def acknowledge_late(
        self: InMemorySender, producer: PayloadProducer, *, on_given: OnGiven = None, **options: int
    ) -> None:
        await send_all(self, producer, on_given=on_given, **options)
        if not guest.is_running:
            await loads.came.wait()

    monkeypatch.setattr(InMemorySender, "send_all", acknowledge_late)
    report = await world.migrate(POLICY)
    assert report.phase is Phase.COMPLETE, report.error
    assert [new for _, new, _ in world.watchers["a"].changes].count(Phase.STOP) == 1


async def test_who_suspends_a_guest_has_the_acknowledgements_before_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    loads, send_all, seen_when_acknowledged = note_loads(world), InMemorySender.send_all, list[int]()

    async def acknowledge_late(
        self: InMemorySender, producer: PayloadProducer, *, on_given: OnGiven = None, **options: int
    ) -> None:
        await send_all(self, producer, on_given=on_given, payloads=options.get("payloads"))
        await delay(0.05)
        seen_when_acknowledged.append(len(loads.seen))

    monkeypatch.setattr(InMemorySender, "send_all", acknowledge_late)
    report = await world.migrate(Policy(is_offline=True))
    assert report.phase is Phase.COMPLETE, report.error
    assert len(loads.seen) == 1
    assert seen_when_acknowledged[-1] == 0


@pytest.mark.parametrize("within_s", [-1.0, math.nan, math.inf, MAX_LOAD_WAIT_S + 1])
async def test_a_load_that_would_wait_too_long_is_refused(within_s: float) -> None:
    world = World()
    handle = world.incoming.handle

    async def change(request: object) -> object:
        return await handle(replace(request, within_s=within_s) if isinstance(request, Load) else request)

    world.incoming.handle = change  # type: ignore[method-assign]
    report = await world.migrate(POLICY)
    assert report.phase is Phase.ROLLED_BACK
    assert "Load may wait 30 s" in (report.error or "")
    assert world.runs_at("a")


async def test_a_load_whose_pages_do_not_come_leaves_the_machine_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    guest, loads, send_all = world.guest, note_loads(world), InMemorySender.send_all
    lost: list[int] = []

    async def lose_one(
        self: InMemorySender, producer: PayloadProducer, *, on_given: OnGiven = None, **options: int
    ) -> None:
        if guest.is_running or lost or on_given is None:
            await send_all(self, producer, on_given=on_given, **options)
            return
        await send_all(self, producer, payloads=options["payloads"])
        lost.append(world.receiver.applied.records)
        on_given(lost[0] + 1)
        await anyio.sleep_forever()

    monkeypatch.setattr(InMemorySender, "send_all", lose_one)
    report = await world.migrate(POLICY)
    assert report.phase is Phase.COMPLETE, report.error
    # One that was refused, one that was obeyed: by one machine.
    assert [type(answer) for answer in loads.answers] == [PeerRefused, Loaded]
    assert "did not come within 0.2 s" in str(loads.answers[0])
    assert report.source_digest == report.destination_digest


async def test_a_machine_with_the_state_of_a_stop_that_was_left_takes_no_other() -> None:
    world = World()
    loads = note_loads(world, answers_after_s=0.3)
    report = await world.migrate(POLICY)
    assert report.phase is Phase.ROLLED_BACK
    assert "device state of a stop that was left" in (report.error or "")
    assert [type(answer) for answer in loads.answers] == [Loaded]
    assert world.may_try_again
    assert world.runs_at("a")
    assert not world.runs_at("b")


@dataclass
class Loads:
    """Each Load that came to the destination, and what was answered."""

    seen: list[Load] = field(default_factory=list)
    answers: list[object] = field(default_factory=list)
    came: anyio.Event = field(default_factory=anyio.Event)


def note_loads(world: World, *, answers_after_s: float = 0.0) -> Loads:
    loads, handle = Loads(), world.incoming.handle

    async def note(request: object) -> object:
        if not isinstance(request, Load):
            return await handle(request)
        loads.seen.append(request)
        loads.came.set()
        try:
            answer = await handle(request)
        except PeerRefused as exc:
            loads.answers.append(exc)
            raise
        loads.answers.append(answer)
        await delay(answers_after_s)
        return answer

    world.incoming.handle = note  # type: ignore[method-assign]
    return loads


async def test_a_link_that_fails_at_every_stop_ends_the_migration() -> None:
    world = World()
    ran = stall_at_stops(world, 1000)
    report = await world.migrate(POLICY)
    assert report.phase is Phase.ROLLED_BACK
    assert len(ran) == MAX_STOPS - 1
    assert world.runs_at("a")
    assert not world.runs_at("b")


async def test_a_cancel_while_the_guest_stands_still_still_works() -> None:
    world = World()
    stall_at_stops(world, 1)
    stop = world.watchers["a"].at_phase[Phase.STOP]

    def both() -> None:
        stop()
        world.controls.cancel()

    world.watchers["a"].at_phase[Phase.STOP] = both
    report = await world.migrate(POLICY)
    assert (report.phase, report.error) == (Phase.ROLLED_BACK, "cancelled by request")
    assert world.runs_at("a")


async def test_an_offline_move_waits_for_the_link() -> None:
    world = World()

    stands = anyio.Event()

    def stop() -> None:
        assert world.sender is not None
        world.sender.stall()
        stands.set()

    async def mend() -> None:
        await stands.wait()
        assert world.sender is not None
        await world.sender.stands.wait()
        world.sender.go_on()

    world.watchers["a"].at_phase[Phase.STOP] = stop
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mend)
        report = await world.migrate(Policy(is_offline=True))
    assert report.phase is Phase.COMPLETE, report.error
    assert (False, False) in world.history
