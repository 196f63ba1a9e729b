from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import anyio
import numpy as np
import pytest

from memory.runs import Runs, intersect, pages_in
from migrate.compression import Compression
from migrate.errors import SetupRefused, StorageFailed
from migrate.facts import CpuFacts
from migrate.messages import Abort, Aborted, Commit, Inspect, Load
from migrate.ownership import Ownership, next_generation
from migrate.phases import Phase
from migrate.plan import OnTimeout, Policy
from tests.migrate.world import FACTS, FakeGuest, World
from tests.waiting import delay

pytestmark = pytest.mark.anyio


async def test_a_live_move_ends_with_equal_ram_and_proof() -> None:
    world = World()
    source_guest = world.guest
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE
    assert report.error is None
    assert report.runs_on == "b"
    incoming = world.hosts["b"].by_id[FACTS.guest_id]
    assert np.array_equal(source_guest.ram.pages, incoming.ram.pages)
    assert report.source_digest is not None
    assert report.source_digest == report.destination_digest
    assert FACTS.guest_id not in world.hosts["a"].by_id
    assert not source_guest.tracker.is_started
    assert world.sender is not None
    assert world.sender.is_closed
    assert world.journals["a"].steps == ["started", "commit-may-leave", "complete"]


async def test_the_phases_are_passed_in_order_and_each_says_why() -> None:
    world = World()
    await world.migrate()
    changes = world.watchers["a"].changes
    assert [new for _, new, _ in changes] == [
        Phase.PREFLIGHT,
        Phase.PRECOPY,
        Phase.STOP,
        Phase.SWITCHOVER,
        Phase.COMPLETE,
    ]
    assert all(because for _, _, because in changes)


async def test_the_guest_is_owned_by_the_destination_afterwards() -> None:
    world = World()
    await world.migrate()
    latest = world.storage.records[max(world.storage.records)]
    # The claim, and the word that it runs.
    assert (latest.generation, latest.owner) == (3, "b")


async def test_downtime_parts_add_up_and_none_is_negative() -> None:
    world = World()
    report = await world.migrate()
    assert report.downtime is not None
    parts = (
        report.downtime.pause_s,
        report.downtime.last_pages_s,
        report.downtime.device_state_s,
        report.downtime.load_s,
        report.downtime.resume_s,
    )
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(report.downtime.total_s)


async def test_an_offline_move_never_runs_the_guest_while_it_copies() -> None:
    world = World()
    source_guest = world.guest
    report = await world.migrate(Policy(is_offline=True))
    assert report.phase is Phase.COMPLETE
    assert report.rounds == ()
    assert not source_guest.tracker.is_started
    assert report.source_digest == report.destination_digest


async def test_all_problems_are_in_one_refusal_and_nothing_is_left() -> None:
    world = World()
    world.hosts["b"].free_memory_bytes = 1 << 20
    world.hosts["b"].cpus = (CpuFacts(model="Haswell", features=("sse2",)),)
    world.storages["b"].is_other_storage = True
    report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert report.error is not None
    for word in ("avx", "MiB free", "disk0"):
        assert word in report.error
    assert world.runs_at("a")
    assert world.hosts["b"].by_id == {}
    assert world.storage.files == {}


async def test_a_guest_that_the_record_gives_to_another_host_is_not_moved() -> None:
    world = World()
    world.storage.records[5] = Ownership(
        guest_id=FACTS.guest_id, generation=5, owner="c", migration_id="other"
    )
    report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert report.error is not None
    assert "belongs to c" in report.error


async def test_a_record_that_a_restarted_destination_gives_back_before_it_answers_is_taken_up() -> None:
    world = World()
    world.storage.records[1] = first = Ownership(
        guest_id=FACTS.guest_id, generation=1, owner="a", migration_id="earlier"
    )
    handle = world.incoming.handle

    async def settle_first(request: object) -> object:
        if isinstance(request, Inspect):
            world.storage.records.setdefault(2, next_generation(first, "a", "earlier"))
        return await handle(request)

    world.incoming.handle = settle_first  # type: ignore[method-assign]
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE, report.error
    assert world.journals["a"].steps == ["started", "started", "commit-may-leave", "complete"]
    latest = world.storage.records[max(world.storage.records)]
    assert (latest.generation, latest.owner) == (4, "b")


async def test_a_full_journal_disk_rolls_back_and_the_guest_runs_on() -> None:
    for step in ("started", "commit-may-leave"):
        world = World()
        world.journals["a"].full_at = step
        report = await world.migrate()
        assert report.phase is Phase.ROLLED_BACK
        assert "no space left" in (report.error or "")
        assert world.runs_at("a")
        assert world.hosts["b"].by_id == {}


async def test_a_full_journal_disk_at_the_destination_rolls_back() -> None:
    for step in ("prepared", "may-claim"):
        world = World()
        world.journals["b"].full_at = step
        report = await world.migrate()
        assert report.phase is Phase.ROLLED_BACK
        assert "no space left" in (report.error or "")
        assert world.runs_at("a")
        assert world.hosts["b"].by_id == {}


async def test_the_destination_is_armed_while_the_guest_still_runs() -> None:
    world = World()
    seen: list[tuple[bool, list[str], list[str], int]] = []
    pause = world.guest.pause

    async def look_then_pause() -> float:
        seen.append(
            (
                world.runs_at("a"),
                list(world.journals["a"].steps),
                list(world.journals["b"].steps),
                len(world.storage.staged),
            )
        )
        return await pause()

    world.guest.pause = look_then_pause  # type: ignore[method-assign]
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE, report.error
    assert seen == [(True, ["started", "commit-may-leave"], ["prepared", "may-claim"], 1)]
    assert world.storage.staged == set()


async def test_an_armed_destination_that_is_not_needed_takes_its_claim_back() -> None:
    world = World()
    world.drops_replies_to = Load
    await world.migrate()
    await world.incoming.abandon("silent")
    assert world.storage.staged == set()
    assert world.journals["b"].steps[-1] == "rolled-back"


async def test_what_the_destination_refused_before_it_began_leaves_no_journal_there() -> None:
    world = World()
    assert isinstance(await world.incoming.handle(Abort(reason="rolled back")), Aborted)
    assert world.incoming.phase is Phase.ROLLED_BACK
    # Its agent has no job of it, so that nobody would ever close such a journal.
    assert world.journals["b"].steps == []


async def test_devices_are_drained_between_every_harvest_and_the_copy_that_follows() -> None:
    world = World()
    steps: list[str] = []
    guest, gather, harvest = world.guest, world.guest.ram.gather, world.guest.tracker.harvest

    async def drain() -> None:
        steps.append("drain")

    def noted_gather(runs: Runs, out: memoryview) -> int:
        steps.append("copy")
        return gather(runs, out)

    def noted_harvest() -> Runs:
        steps.append("clear")
        return harvest()

    guest.drain = drain  # type: ignore[method-assign]
    guest.ram.gather = noted_gather  # type: ignore[method-assign]
    guest.tracker.harvest = noted_harvest  # type: ignore[method-assign]
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE, report.error
    # The audit copies once more, after the guest has left.
    told = [step for at, step in enumerate(steps) if at == 0 or step != steps[at - 1]]
    assert told[:7] == ["clear", "drain", "copy", "clear", "drain", "copy", "clear"]
    # Before the first round and after each, before and after what the guest wrote while its switchover was made ready,
    # and at the stop.
    assert steps.count("clear") == 1 + len(report.rounds) + 3
    assert all(earlier == "drain" for earlier, step in pairwise(told[:-1]) if step == "copy")


async def test_pages_that_are_written_again_travel_as_deltas_unless_that_is_switched_off() -> None:
    for changed, has_deltas in (
        ({}, True),
        ({"delta_cache_bytes": 0}, False),
        ({"compression": Compression.OFF}, False),
    ):
        report = await World().migrate(**changed)
        assert report.phase is Phase.COMPLETE, report.error
        assert (report.counts.delta_pages > 0) == has_deltas
        assert report.source_digest == report.destination_digest


class Device:
    """A device that had pinned a page before a harvest: its data is in RAM after the next drain, and in no log."""

    def __init__(self, guest: FakeGuest, gfn: int, *, at_harvest: int) -> None:
        self.guest, self.gfn = guest, gfn
        self._left = at_harvest
        self._is_pending = False
        self._harvest = guest.tracker.harvest

    def harvest(self) -> Runs:
        self._left -= 1
        if self._left == 0:
            self.guest.write([self.gfn])
            self._is_pending = True
        return self._harvest()

    async def drain(self) -> None:
        if self._is_pending:
            self._is_pending = False
            self.guest.ram.pages[self.gfn, 100] = 77

    async def pause(self) -> float:
        # A stopped guest has no write under way.
        await self.drain()
        return await FakeGuest.pause(self.guest)


# A page that has gone when the log is looked at, and one that has not.
@pytest.mark.parametrize("gfn", [0, 598])
async def test_what_is_written_during_a_long_first_round_is_put_off_and_no_write_of_a_device_is_lost(
    gfn: int,
) -> None:
    # 1.2 MB in the first round, at three payloads: the log is looked at after 0.1 and 0.3 s.
    world = World()
    world.link_bytes_per_s = 2.5e6
    guest = world.guest
    guest.dirty_per_round = [100, 60, 60, 20, 5, 2]
    device = Device(guest, gfn, at_harvest=2)
    rounds_before: list[int] = []

    def noted_harvest() -> Runs:
        rounds_before.append(len(world.watchers["a"].rounds))
        return device.harvest()

    guest.tracker.harvest = noted_harvest  # type: ignore[method-assign]
    guest.drain = device.drain  # type: ignore[method-assign]
    guest.pause = device.pause  # type: ignore[method-assign]
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE, report.error
    assert report.source_digest == report.destination_digest
    # Before the first round, in it, and at its end.
    assert rounds_before.count(0) >= 3
    # What it wrote early in the round was sent late in it, and not again.
    first = report.rounds[0]
    assert first.dirty_pages < first.dirty_rate_pages_per_s * first.duration_s - 10


async def test_what_a_guest_writes_while_its_switchover_is_made_ready_is_sent_before_it_stops() -> None:
    world = World()
    guest, gather = world.guest, world.guest.ram.gather
    copied_at_the_stop: list[int] = []

    async def prepare() -> None:
        guest.dirty_per_round = []
        guest.write(range(300))

    def noted_gather(runs: Runs, out: memoryview) -> int:
        if world.watchers["a"].changes[-1][1] is Phase.STOP:
            copied_at_the_stop.append(pages_in(runs))
        return gather(runs, out)

    guest.prepare_switchover = prepare  # type: ignore[method-assign]
    guest.ram.gather = noted_gather  # type: ignore[method-assign]
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE, report.error
    assert report.source_digest == report.destination_digest
    # The page that it wrote during the short round.
    assert copied_at_the_stop == [1]


async def test_a_guest_that_writes_as_fast_as_it_is_copied_is_stopped_after_one_short_round() -> None:
    world = World()
    guest = world.guest

    async def prepare() -> None:
        guest.dirty_per_round = [500] * 20

    guest.prepare_switchover = prepare  # type: ignore[method-assign]
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE, report.error
    # Before the short round and after it: the guest stands still at the last harvest.
    assert len(guest.dirty_per_round) == 18


async def test_pages_that_the_guest_gave_back_are_zero_at_the_destination_too() -> None:
    world = World()
    guest, pause = world.guest, world.guest.pause
    given_back = np.array([[2, 3], [90, 1]], dtype=np.int64)

    async def give_back_then_pause() -> float:
        # As a balloon does: the file gets holes, and no log has them.
        guest.ram.scatter_zeros(given_back)
        return await pause()

    guest.pause = give_back_then_pause  # type: ignore[method-assign]
    guest.discarded_runs = lambda among: intersect(among, given_back)  # type: ignore[method-assign]
    guest.discards = True
    report = await world.migrate()
    assert report.phase is Phase.COMPLETE, report.error
    assert report.source_digest == report.destination_digest


async def test_a_device_state_of_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrate.devicestate.MAX_DEVICE_STATE_BYTES", len(b"registers") - 1)
    world = World()
    report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert "device state" in (report.error or "")
    assert world.runs_at("a")


async def test_a_page_that_went_wrong_is_found_before_the_guest_may_run() -> None:
    world = World()
    world.spoils_ram = True
    report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert "digests differ" in (report.error or "")
    assert world.runs_at("a")


async def test_a_destination_that_cannot_start_the_guest_gives_it_back() -> None:
    world = World()
    world.destination_refuses_to_resume = True
    report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert "does not start" in (report.error or "")
    assert world.runs_at("a")
    latest = world.storage.records[max(world.storage.records)]
    assert (latest.generation, latest.owner) == (3, "a")


async def test_a_lost_answer_to_commit_is_settled_by_ownership() -> None:
    world = World()
    world.drops_replies_to = Commit
    report = await world.migrate()
    assert [new for _, new, _ in world.watchers["a"].changes][-2:] == [Phase.IN_DOUBT, Phase.COMPLETE]
    assert report.runs_on == "b"
    assert (True, True) not in world.history


async def test_a_lost_answer_to_load_rolls_back() -> None:
    world = World()
    world.drops_replies_to = Load
    report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert world.runs_at("a")
    await world.incoming.abandon("silent")
    assert not world.runs_at("b")


async def test_a_link_that_breaks_while_the_guest_stands_still_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("migrate.source.STOP_BUDGET_S", 0.02)
    monkeypatch.setattr("migrate.source.STOP_BUDGET_LIMITS", 0)
    world = World(outage_s=1000)
    world.drops_replies_to = Load
    with anyio.fail_after(10):
        report = await world.migrate(call_timeout_s=0.5)
    assert report.phase is Phase.ROLLED_BACK
    because = [because for _, new, because in world.watchers["a"].changes if new is Phase.PRECOPY]
    assert "stood still for 0.02 s" in because[-1]
    assert world.runs_at("a")


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_guest_that_is_being_given_back_when_the_link_fails_keeps_its_copy_at_the_source(
    monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    # The destination has claimed the guest, could not start it, and is about to give it back; the source hears nothing
    # and looks at the record just then.
    monkeypatch.setattr("migrate.doubt.CLAIM_PAUSE_S", 0.05)
    world = World(outage_s=0.05)
    world.destination_refuses_to_resume = True
    storage = world.storages["b"]
    claim = storage.claim

    async def claim_slowly(directory: str, wanted: Ownership) -> Ownership:
        if wanted.owner == "a":
            world.link_is_down.set()
            # Longer than the source waits before it looks, and then within its attempts or after all of them.
            await delay(0.2 if comes_back else 1.0)
            if not comes_back:
                raise StorageFailed("the storage is gone")
        return await claim(directory, wanted)

    monkeypatch.setattr(storage, "claim", claim_slowly)
    with anyio.fail_after(10):
        report = await world.migrate(call_timeout_s=0.5)
    assert FACTS.guest_id in world.hosts["a"].by_id
    assert report.phase is (Phase.ROLLED_BACK if comes_back else Phase.IN_DOUBT), report.error
    assert world.runs_at("a") is comes_back
    assert not world.runs_at("b")


async def test_storage_that_fails_in_doubt_leaves_the_guest_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrate.doubt.CLAIM_PAUSE_S", 0.0)
    world = World()
    world.drops_replies_to = Commit
    world.storage.failing_claims = {"a": ["", *["before"] * 5], "b": ["before"]}
    report = await world.migrate()
    assert report.phase is Phase.IN_DOUBT
    assert report.runs_on is None
    assert "vmferry resolve" in (report.error or "")
    assert (world.runs_at("a"), world.runs_at("b")) == (False, False)


@pytest.mark.parametrize("kind", ["before", "after"])
async def test_a_claim_that_nobody_confirmed_is_never_acted_on_twice(kind: str) -> None:
    world = World()
    world.storage.failing_claims = {"b": [kind]}
    report = await world.migrate()
    assert (True, True) not in world.history
    # Not made: the source takes it. Made, but unconfirmed: it stands, and nobody knows whether the guest will run
    # there; the stopped copy here is kept until the destination has said so.
    assert report.phase is (Phase.ROLLED_BACK if kind == "before" else Phase.IN_DOUBT)
    assert FACTS.guest_id in world.hosts["a"].by_id
    assert world.incoming.phase is Phase.IN_DOUBT
    assert world.runs_at("a") is (kind == "before")


async def test_an_ended_migration_keeps_none_of_its_buffers() -> None:
    world = World()
    await world.migrate()
    assert world.sender is not None
    sender, world.sender = weakref.ref(world.sender), None
    gc.collect()  # asyncio leaves the frames of cancelled tasks in cycles
    assert sender() is None


async def test_cancel_in_the_precopy_rolls_back() -> None:
    world = World()
    world.link_bytes_per_s = 2e6
    world.watchers["a"].at_phase[Phase.PRECOPY] = world.controls.cancel
    report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert "cancelled" in (report.error or "")
    assert world.runs_at("a")
    assert world.hosts["b"].by_id == {}
    assert not world.guest.tracker.is_started


async def test_cancel_is_refused_once_commit_may_have_left() -> None:
    world = World()
    refused = []

    def cancel() -> None:
        with pytest.raises(SetupRefused, match="no longer be cancelled"):
            world.controls.cancel()
        refused.append(True)

    world.watchers["a"].at_phase[Phase.SWITCHOVER] = cancel
    report = await world.migrate()
    assert refused
    assert report.phase is Phase.COMPLETE


async def test_a_cancelled_task_rolls_back_before_it_ends() -> None:
    world = World()
    world.watchers["a"].at_phase[Phase.PRECOPY] = world.source_task.cancel
    assert await world.try_to_migrate() is None
    assert world.runs_at("a")
    assert world.hosts["b"].by_id == {}


async def test_the_time_limit_aborts_or_suspends_as_the_policy_says() -> None:
    for on_timeout, phase in ((OnTimeout.ABORT, Phase.ROLLED_BACK), (OnTimeout.SUSPEND, Phase.COMPLETE)):
        world = World()
        world.link_bytes_per_s = 20e6
        world.guest.dirty_per_round = [500] * 1000
        report = await world.migrate(
            Policy(downtime_limit_s=0.0001, timeout_s=0.15, on_timeout=on_timeout), call_timeout_s=5
        )
        assert report.phase is phase, report.error
        assert (True, True) not in world.history
        if phase is Phase.ROLLED_BACK:
            assert "time limit" in (report.error or "")


async def test_a_destination_that_fails_meanwhile_ends_the_precopy() -> None:
    world = World()
    world.link_bytes_per_s = 1e5

    def break_destination() -> None:
        world.receiver.failure = OSError("no space left on device")

    world.watchers["a"].at_phase[Phase.PRECOPY] = break_destination
    with anyio.fail_after(10):
        report = await world.migrate()
    assert report.phase is Phase.ROLLED_BACK
    assert "no space left" in (report.error or "")
