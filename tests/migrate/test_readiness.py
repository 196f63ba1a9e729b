"""The second preflight and the arming go on beside the rounds, and are over before the guest stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
import anyio.abc
import pytest

from migrate.copying import Copier
from migrate.errors import PreflightRefused
from migrate.phases import Phase
from migrate.plan import ASSUMED_FIXED_S, Decision, Next, Policy
from migrate.readiness import Readiness
from migrate.stats import RoundStats
from tests.migrate.world import World
from tests.waiting import delay

pytestmark = pytest.mark.anyio


class Steps:
    """The two steps, each over when it is let go, or at once."""

    def __init__(self, *, are_over: bool = False) -> None:
        self.taken: list[str] = []
        self.examined, self.armed = anyio.Event(), anyio.Event()
        if are_over:
            self.examined.set()
            self.armed.set()

    async def examine(self) -> None:
        self.taken.append("examine")
        await self.examined.wait()

    async def arm(self) -> None:
        self.taken.append("arm")
        await self.armed.wait()

    def readiness(self) -> Readiness:
        return Readiness(self.examine, self.arm)


async def test_nothing_is_waited_for_when_both_are_over() -> None:
    steps = Steps(are_over=True)
    readiness = steps.readiness()
    async with anyio.create_task_group() as tasks:
        readiness.begin(tasks)
        readiness.begin(tasks)
        await anyio.wait_all_tasks_blocked()
        assert await readiness.reached(tasks)
    assert steps.taken == ["examine", "arm"]


@pytest.mark.parametrize("has_begun", [True, False])
async def test_what_is_not_over_is_waited_for_and_the_guest_has_written_meanwhile(has_begun: bool) -> None:
    steps = Steps()
    readiness = steps.readiness()
    answers: list[bool] = []
    async with anyio.create_task_group() as tasks:
        if has_begun:
            readiness.begin(tasks)

        async def wait() -> None:
            answers.append(await readiness.reached(tasks))

        tasks.start_soon(wait)
        for event in (steps.examined, steps.armed):
            await anyio.wait_all_tasks_blocked()
            assert answers == []
            event.set()
    assert answers == [False]
    assert steps.taken == ["examine", "arm"]


async def test_a_preflight_that_is_too_old_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrate.readiness.PREFLIGHT_HOLDS_S", 0.01)
    steps = Steps(are_over=True)
    readiness = steps.readiness()
    async with anyio.create_task_group() as tasks:
        readiness.begin(tasks)
        await delay(0.05)
        assert not await readiness.reached(tasks)
    # Both ends are as ready as before.
    assert steps.taken == ["examine", "arm", "examine"]


async def test_what_speaks_against_the_stop_ends_the_rounds() -> None:
    async def refuse() -> None:
        raise PreflightRefused(("no room",))

    readiness = Readiness(refuse, Steps().arm)

    async def copy() -> None:
        async with anyio.create_task_group() as tasks:
            readiness.begin(tasks)
            await anyio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await copy()
    assert caught.group_contains(PreflightRefused)


@dataclass
class Script:
    """What a migration did: its rounds and its requests in order; the planner's decisions are given."""

    world: World
    predicted_s: list[float]
    steps: list[str] = field(default_factory=list)
    # What the second preflight waits for.
    second_round: anyio.Event | None = None

    def decide(self, rounds: Sequence[RoundStats], policy: Policy, fixed_s: float) -> Decision:
        self.steps.append("round")
        if len(rounds) > 1 and self.second_round is not None:
            self.second_round.set()
        is_last = len(rounds) == len(self.predicted_s)
        return Decision(
            next=Next.SWITCH_OVER if is_last else Next.AGAIN,
            because="by the script",
            predicted_downtime_s=self.predicted_s[len(rounds) - 1],
        )

    async def handle(self, request: object) -> object:
        name = type(request).__name__
        if name in ("Inspect", "Arm", "Load"):
            self.steps.append(name)
        if name == "Inspect" and self.steps.count(name) > 1 and self.second_round is not None:
            with anyio.fail_after(5):
                await self.second_round.wait()
        return await self._handle(request)

    def __post_init__(self) -> None:
        self._handle = self.world.incoming.handle
        self.world.incoming.handle = self.handle  # type: ignore[method-assign]


async def test_rounds_go_on_while_the_stop_is_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    script = Script(world, [1.0, 0.1, 0.1, 0.1], second_round=anyio.Event())
    monkeypatch.setattr("migrate.source.decide", script.decide)
    report = await world.migrate(Policy(downtime_limit_s=0.3))
    assert report.phase is Phase.COMPLETE, report.error
    # No stop was in sight after the first round. The second preflight was answered when two more had ended.
    assert script.steps[:4] == ["Inspect", "round", "round", "Inspect"]
    assert script.steps.count("round") == 4
    assert script.steps[-2:] == ["Arm", "Load"] or script.steps[-3:] == ["Arm", "round", "Load"]


@pytest.mark.parametrize(("last_s", "is_caught_up"), [(0.2, True), (ASSUMED_FIXED_S + 0.005, False)])
async def test_a_guest_that_was_ready_is_caught_up_with_only_if_much_is_left(
    monkeypatch: pytest.MonkeyPatch, last_s: float, is_caught_up: bool
) -> None:
    world = World()
    script = Script(world, [0.1, 0.1, last_s])
    monkeypatch.setattr("migrate.source.decide", script.decide)
    caught_up: list[bool] = []
    catch_up = Copier.catch_up

    async def note(self: Copier) -> None:
        caught_up.append(True)
        await catch_up(self)

    async def be_ready(self: Readiness, tasks: anyio.abc.TaskGroup) -> bool:
        await reached(self, tasks)
        return True

    reached = Readiness.reached
    monkeypatch.setattr(Readiness, "reached", be_ready)
    monkeypatch.setattr(Copier, "catch_up", note)
    report = await world.migrate(Policy(downtime_limit_s=0.3))
    assert report.phase is Phase.COMPLETE, report.error
    assert caught_up == [True] * is_caught_up


@pytest.mark.parametrize("predicted_s", [0.1, 1.0])
async def test_a_stop_that_nobody_saw_coming_waits_until_it_is_ready(
    monkeypatch: pytest.MonkeyPatch, predicted_s: float
) -> None:
    world = World()
    script = Script(world, [predicted_s])
    monkeypatch.setattr("migrate.source.decide", script.decide)
    world.guest.dirty_per_round = [200, 60, 20, 5, 2]
    report = await world.migrate(Policy(downtime_limit_s=0.3))
    assert report.phase is Phase.COMPLETE, report.error
    assert script.steps == ["Inspect", "round", "Inspect", "Arm", "Load"]
    assert report.source_digest == report.destination_digest
