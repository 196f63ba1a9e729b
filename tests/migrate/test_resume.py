"""A migration that goes on with the machine of one whose source was restarted."""

from __future__ import annotations

from dataclasses import replace

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from memory.layout import PAGE_BYTES
from migrate.destination import IncomingMigration
from migrate.messages import MAX_COMPARED_GROUPS, Compare, Compared, Prepare
from migrate.phases import Phase
from migrate.plan import Policy
from migrate.stats import Report
from tests.migrate.world import FACTS, PAGES, World
from transport.errors import PeerRefused

pytestmark = pytest.mark.anyio


async def start_and_die(world: World, *, after_bytes: int) -> None:
    """Begin a migration, and let its source vanish in the first round: the destination hears nothing of it."""
    world.link_bytes_per_s = 1e7
    async with anyio.create_task_group() as tasks:

        async def kill() -> None:
            while world.sender is None or world.sender.wire_bytes < after_bytes:
                await anyio.lowlevel.checkpoint()
            world.link_is_down.set()
            world.source_task.cancel()

        tasks.start_soon(kill)
        await world.try_to_migrate()
    world.link_bytes_per_s = None
    assert world.incoming.phase is Phase.PRECOPY
    assert world.guest.is_running


def begin_again(world: World) -> IncomingMigration:
    """Let a new source and a new migration meet what the old one has left; give the old one."""
    old = world.incoming
    world.link_is_down = anyio.Event()
    world.source_task = anyio.CancelScope()
    world.earlier["migration-1"] = old
    world.incoming = IncomingMigration("migration-2", world._destination_ports())
    return old


async def go_on(world: World, policy: Policy | None = None) -> Report:
    return await world.migrate(policy, migration_id="migration-2", resumes="migration-1")


def ram_of(world: World, host: str) -> object:
    return world.hosts[host].by_id[FACTS.guest_id].ram.pages


@pytest.mark.parametrize("is_offline", [False, True])
async def test_what_the_destination_has_is_not_sent_again(is_offline: bool) -> None:
    world = World()
    await start_and_die(world, after_bytes=120_000)
    machine = world.hosts["b"].by_id[FACTS.guest_id]
    old = begin_again(world)
    before = world.guest.ram.pages.copy()
    there = int((machine.ram.pages.any(axis=1)).sum())
    assert 0 < there < PAGES // 2
    world.guest.dirty_per_round = []
    report = await go_on(world, Policy(is_offline=is_offline))
    assert report.phase is Phase.COMPLETE, report.error
    assert report.kept_pages == there
    assert report.counts.pages < PAGES // 2
    assert world.hosts["b"].by_id[FACTS.guest_id] is machine
    assert old.phase is Phase.ROLLED_BACK
    assert report.source_digest == report.destination_digest
    changed = (machine.ram.pages != before).any(axis=1).sum()
    assert changed < 10
    assert (True, True) not in world.history


async def test_pages_that_changed_or_vanished_meanwhile_are_sent() -> None:
    world = World()
    await start_and_die(world, after_bytes=200_000)
    world.guest.ram.pages[0] = 0  # a hole now, and not at the destination
    world.guest.ram.pages[2, :8] = np.arange(8, dtype=np.uint8)
    world.guest.dirty_per_round = []
    begin_again(world)
    report = await go_on(world)
    assert report.phase is Phase.COMPLETE, report.error
    assert report.source_digest == report.destination_digest
    there = world.hosts["b"].by_id[FACTS.guest_id].ram.pages
    assert not there[0].any()
    assert there[2, :8].tolist() == list(range(8))


async def test_another_machine_is_made_where_the_old_one_does_not_fit() -> None:
    world = World()
    await start_and_die(world, after_bytes=120_000)
    machine = world.hosts["b"].by_id[FACTS.guest_id]
    old = begin_again(world)
    world.guest.facts = replace(FACTS, spec=b"another")
    report = await go_on(world)
    assert (report.phase, report.kept_pages) == (Phase.COMPLETE, 0)
    assert world.hosts["b"].by_id[FACTS.guest_id] is not machine
    assert old.phase is Phase.ROLLED_BACK


async def test_an_attempt_that_is_not_known_there_is_sent_from_the_start() -> None:
    world = World()
    report = await go_on(world)
    assert (report.phase, report.kept_pages) == (Phase.COMPLETE, 0)


async def test_a_machine_with_its_device_state_is_not_taken_over() -> None:
    world = World()
    world.hosts["b"].by_id.clear()
    await world.migrate()
    assert world.incoming.phase is Phase.COMPLETE
    assert await world.incoming.hand_over("migration-2", FACTS) is None
    assert world.incoming.phase is Phase.COMPLETE
    assert world.runs_at("b")


async def test_a_migration_that_was_handed_over_never_commits() -> None:
    world = World()
    await start_and_die(world, after_bytes=120_000)
    machine = await world.incoming.hand_over("migration-2", FACTS)
    assert machine is world.hosts["b"].by_id[FACTS.guest_id]
    with pytest.raises(PeerRefused):
        await world.incoming.handle(Compare(first_group=0, digests=bytes(16)))
    await world.incoming.abandon("again")
    assert FACTS.guest_id in world.hosts["b"].by_id


@pytest.mark.parametrize(
    ("first_group", "length"),
    [(0, 0), (0, 15), (-1, 16), (3, 16), (2, 32), (1 << 40, 16), (0, 16 * (MAX_COMPARED_GROUPS + 1))],
)
async def test_a_comparison_of_what_is_not_there_is_refused(first_group: int, length: int) -> None:
    world = World()
    await start_and_die(world, after_bytes=120_000)
    with pytest.raises(PeerRefused, match="cannot be compared"):
        await world.incoming.handle(Compare(first_group=first_group, digests=bytes(length)))


@pytest.mark.parametrize(
    "answer",
    [
        Compared(groups=(7,), hashes=bytes(8)),
        Compared(groups=(0,), hashes=bytes(8)),
        Compared(groups=(-1,), hashes=bytes(256 * 8)),
        Compared(groups=(0, 0), hashes=bytes(8)),
    ],
)
async def test_a_destination_that_compares_nonsense_ends_the_migration(answer: Compared) -> None:
    world = World()
    await start_and_die(world, after_bytes=120_000)
    begin_again(world)
    handle = world.incoming.handle

    async def lie(request: object) -> object:
        return answer if isinstance(request, Compare) else await handle(request)

    world.incoming.handle = lie  # type: ignore[method-assign]
    report = await go_on(world)
    assert report.phase is Phase.ROLLED_BACK
    assert "compared something else" in (report.error or "")
    assert world.runs_at("a")
    assert not world.runs_at("b")


async def test_the_second_preflight_knows_what_is_there_already() -> None:
    world = World()
    await start_and_die(world, after_bytes=120_000)
    begin_again(world)
    # Not room for two of it.
    world.hosts["b"].free_memory_bytes = (64 << 20) + PAGES * PAGE_BYTES - 20 * PAGE_BYTES
    report = await go_on(world)
    assert report.phase is Phase.COMPLETE, report.error


async def test_the_order_is_in_the_journal_and_giving_up_is_said_before_it_is_done() -> None:
    world = World()
    seen: list[object] = []
    handle = world.incoming.handle

    async def refuse(request: object) -> object:
        if isinstance(request, Prepare):
            seen.append(request.resumes)
            raise PeerRefused("refused", "not today")
        return await handle(request)

    world.incoming.handle = refuse  # type: ignore[method-assign]
    report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert world.journals["a"].steps == ["started", "rolling-back", "rolled-back"]
    assert seen == [""]
