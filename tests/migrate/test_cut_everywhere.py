"""The safety theorem, executed: break at operation k, for all k, before and after delivery."""

from __future__ import annotations

import pytest

from migrate.messages import Commit
from migrate.ownership import Verdict
from migrate.phases import Phase
from tests.faults import Fuse
from tests.migrate.world import FACTS, World

pytestmark = pytest.mark.anyio

# Operations of a migration in this world that nothing disturbs, both ends counted, with room to spare: the
# test below says when this no longer covers them all.
QUIET_RUN_OPERATIONS = 130


def check_theorem(world: World, phase: Phase) -> None:
    assert (True, True) not in world.history
    runs = (world.runs_at("a"), world.runs_at("b"))
    match phase:
        case Phase.COMPLETE:
            assert runs == (False, True)
        case Phase.ROLLED_BACK:
            assert runs == (True, False)
        case Phase.IN_DOUBT:
            assert runs != (True, True)
        case other:
            raise AssertionError(f"ended in {other}")


async def test_the_theorem_would_notice_a_source_that_goes_back_on_a_lost_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def believe_in_timeouts(*arguments: object) -> Verdict:
        return Verdict.SOURCE

    monkeypatch.setattr("migrate.source.settle", believe_in_timeouts)
    world = World()
    world.drops_replies_to = Commit
    report = await world.migrate()
    with pytest.raises(AssertionError):
        check_theorem(world, report.phase)


async def test_a_quiet_run_has_fewer_operations_than_are_cut() -> None:
    world = World()
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE, report.error
    assert 20 < world.fuse.operations < QUIET_RUN_OPERATIONS


@pytest.mark.parametrize("lose_after_send", [False, True])
@pytest.mark.parametrize("at", range(QUIET_RUN_OPERATIONS))
async def test_no_cut_makes_two_guests_and_one_cut_ends_nothing(at: int, lose_after_send: bool) -> None:
    world = World(Fuse(at, lose_after_send), outage_s=5)
    report = await world.migrate()
    check_theorem(world, report.phase)
    # One break is re-dialled: the migration goes on.
    assert report.phase is Phase.COMPLETE, report.error


@pytest.mark.parametrize("at", range(QUIET_RUN_OPERATIONS))
async def test_a_link_that_stays_down_leaves_exactly_one_guest(at: int) -> None:
    class LastingFuse(Fuse):
        def count(self) -> bool:
            breaks = super().count()
            if breaks:
                world.link_is_down.set()
            return breaks

    world = World(LastingFuse(at))
    report = await world.migrate()
    check_theorem(world, report.phase)
    assert report.phase in (Phase.COMPLETE, Phase.ROLLED_BACK)
    # A destination that hears nothing more gives up, and that changes nothing any more.
    await world.incoming.abandon("the source is silent")
    check_theorem(world, report.phase)
    if report.phase is Phase.ROLLED_BACK:
        assert FACTS.guest_id not in world.hosts["b"].by_id
