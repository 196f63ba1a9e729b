"""A cluster of three etcds that loses members in the middle of a claim: one claim wins, or nobody believes anything."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from functools import partial

import anyio
import pytest
from anyio.to_thread import run_sync

from agents.ownership.etcd import EtcdRecords
from migrate.errors import NotRecorded, StorageFailed
from migrate.ownership import Ownership, record_name
from tests.agents.claims import (
    SLACK_S,
    STEPS,
    TIMEOUT_S,
    check_step,
    check_there_and_back,
    claim,
    guest_named_by,
    in_order,
    lines_of,
    prepare,
    record,
    records_in,
)
from tests.agents.etcds import Cluster, Member, running_cluster
from tests.agents.host.fleet import running_fleet, scratch_folder

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt,
]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(members: Cluster) -> Iterator[Cluster]:
    """All three members are well at the beginning, and at the end of the last test."""
    members.heal()
    yield members
    members.heal()


@pytest.fixture
def guest_id(request: pytest.FixtureRequest) -> str:
    """A guest of this test alone."""
    return guest_named_by(request)


def kill_a_follower(cluster: Cluster) -> Member:
    member = cluster.followers()[0]
    member.kill()
    return member


def kill_the_leader(cluster: Cluster) -> Member:
    member = cluster.leader()
    member.kill()
    return member


def freeze_the_leader(cluster: Cluster) -> Member:
    member = cluster.leader()
    member.freeze()
    return member


def freeze_a_follower(cluster: Cluster) -> Member:
    member = cluster.followers()[0]
    member.freeze()
    return member


FAULTS = (kill_a_follower, kill_the_leader, freeze_a_follower, freeze_the_leader)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_with_one_member_lost_every_step_of_a_claim_succeeds_within_the_timeouts(
    cluster: Cluster, guest_id: str, fault: Callable[[Cluster], Member], step: str
) -> None:
    await check_step(cluster, guest_id, fault, step)


@pytest.mark.parametrize("step", STEPS)
async def test_without_a_quorum_nothing_is_believed_and_after_it_exactly_one_claim_stands(
    cluster: Cluster, guest_id: str, step: str
) -> None:
    take, generation = STEPS[step]
    before = generation if step in ("stage", "latest") else generation - 1
    async with records_in(*cluster.urls) as here, records_in(*cluster.urls[::-1]) as there:
        place = await prepare(here, guest_id, before)
        for member in cluster.members[:2]:
            await run_sync(member.kill)
        claimants = {"host-a": here, "host-b": there}

        async def try_it(owner: str) -> None:
            # The third member was given the question: nobody may say that nothing came of it.
            with pytest.raises(StorageFailed) as failed:
                await take(claimants[owner], place, guest_id, owner)
            assert not isinstance(failed.value, NotRecorded)

        with anyio.fail_after(len(cluster.urls) * TIMEOUT_S + SLACK_S):
            async with anyio.create_task_group() as tasks:
                for owner in claimants:
                    tasks.start_soon(try_it, owner)
        await run_sync(cluster.heal)
        found = {owner: await take(records, place, guest_id, owner) for owner, records in claimants.items()}
        assert found["host-a"] == found["host-b"]
        for records in claimants.values():
            standing = await records.latest(place, guest_id)
            assert standing is not None
            assert standing.generation == generation
            assert step == "stage" or standing == found["host-a"]


async def test_of_two_who_claim_while_the_leader_stands_still_exactly_one_wins(
    cluster: Cluster, guest_id: str
) -> None:
    async with records_in(*cluster.urls) as before:
        place = await prepare(before, guest_id, 1)
    leader = await run_sync(freeze_the_leader, cluster)
    claimed: dict[str, Ownership] = {}

    async def take(owner: str, urls: tuple[str, ...]) -> None:
        async with records_in(*urls) as records:
            claimed[owner] = await claim(records, place, guest_id, owner)

    async with anyio.create_task_group() as tasks:
        # One of them has its question lie with the frozen leader before it is heard elsewhere.
        tasks.start_soon(take, "host-a", in_order(leader, cluster))
        tasks.start_soon(take, "host-b", in_order(leader, cluster)[::-1])
    assert len(set(claimed.values())) == 1
    await run_sync(cluster.heal)
    async with records_in(leader.url) as records:
        assert await records.latest(place, guest_id) == claimed["host-a"]


async def test_a_member_that_was_left_behind_does_not_give_an_old_record(
    cluster: Cluster, guest_id: str
) -> None:
    async with records_in(*cluster.urls) as records:
        place = await prepare(records, guest_id, 1)
    stale = await run_sync(freeze_a_follower, cluster)
    others = [member for member in cluster.members if member is not stale]
    # What they send it lies in its sockets, and would be read: they are new ones, to whom it has never answered.
    for member in others:
        await run_sync(member.kill)
    for member in others:
        await run_sync(member.start)
    await run_sync(cluster.leader)
    async with records_in(*(member.url for member in others)) as records:
        newest = await claim(records, place, guest_id, "host-b")
    for member in others:
        await run_sync(member.freeze)
    await run_sync(stale.thaw)
    # It lives, and has the old record: who would read without asking the others is told that one.
    keys = [f"/vmferry/records/{record_name(guest_id, number)}".encode() for number in (1, 2)]
    has = [
        "kvs" in await run_sync(partial(ask_serializable, stale, base64.b64encode(key).decode()))
        for key in keys
    ]
    assert has == [True, False]
    async with records_in(stale.url) as records:
        for ask in (
            records.latest(place, guest_id),
            claim(records, place, guest_id, "host-c"),
            records.stage_claim(place, record(guest_id, 2, "host-c")),
        ):
            with pytest.raises(StorageFailed) as failed:
                await ask
            assert not isinstance(failed.value, NotRecorded)
        await run_sync(cluster.heal)
        assert await records.latest(place, guest_id) == newest
        assert await claim(records, place, guest_id, "host-c") == newest


def ask_serializable(member: Member, key: str) -> dict[str, object]:
    return member.ask("/v3/kv/range", {"key": key, "serializable": True})


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("moment", ["before the move", "before the claim", "after the claim"])
async def test_a_guest_moves_while_a_member_is_lost(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Cluster], Member], moment: str
) -> None:
    original = EtcdRecords.claim
    faults: list[str] = []

    async def fail(why: str) -> None:
        if why == moment and not faults:
            faults.append(why)
            await run_sync(fault, cluster)

    async def claim_with_fault(self: EtcdRecords, directory: str, wanted: Ownership) -> Ownership:
        if wanted.generation < 2:
            return await original(self, directory, wanted)
        await fail("before the claim")
        standing = await original(self, directory, wanted)
        await fail("after the claim")
        return standing

    monkeypatch.setattr(EtcdRecords, "claim", claim_with_fault)
    with scratch_folder() as folder:
        async with running_fleet(folder, etcd=lines_of(*cluster.urls)) as fleet:
            guest = fleet.start_guest("host-a", disk_path=None).guest_id
            await fail("before the move")
            job = await fleet.start("worker", "host-a", "host-b")
            report = await check_there_and_back(fleet, cluster, guest, job)
            assert report.downtime is not None
            assert report.downtime.total_s < len(cluster.urls) * TIMEOUT_S + SLACK_S
            assert faults == [moment]
            async with records_in(*cluster.urls) as records:
                newest = await records.latest(await records.place(), guest)
            assert newest is not None
            assert newest.owner == "host-a"
