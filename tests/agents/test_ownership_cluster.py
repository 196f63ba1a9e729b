"""A cluster of three etcds that loses members in the middle of a claim: one claim wins, or nobody believes anything."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import pytest
from anyio.to_thread import run_sync

from agents.ownership.etcd import EtcdRecords
from migrate.errors import NotRecorded, StorageFailed
from migrate.ownership import Ownership, record_name
from migrate.phases import Phase
from tests.agents.etcds import Cluster, Member, place_of, running_cluster
from tests.agents.host.fleet import report_of, running_fleet, scratch_folder

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    # An election takes seconds, and waits of both loops are tried by the tests of one etcd.
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),
]

# The default of [storage.etcd], for each endpoint in turn; an election takes 1 to 2 s.
TIMEOUT_S = 2.0
# What may be added by a machine that does other things as well.
SLACK_S = 3.0

Step = Callable[[EtcdRecords, str, str, str], Awaitable[Ownership | None]]


def record(guest_id: str, generation: int, owner: str) -> Ownership:
    return Ownership(guest_id=guest_id, generation=generation, owner=owner, migration_id="m-1")


async def stage(records: EtcdRecords, place: str, guest_id: str, owner: str) -> None:
    await records.stage_claim(place, record(guest_id, 2, owner))


async def claim(records: EtcdRecords, place: str, guest_id: str, owner: str) -> Ownership:
    return await records.claim(place, record(guest_id, 2, owner))


async def say_that_it_runs(records: EtcdRecords, place: str, guest_id: str, owner: str) -> Ownership:
    return await records.claim(place, record(guest_id, 3, owner))


async def latest(records: EtcdRecords, place: str, guest_id: str, owner: str) -> Ownership | None:
    return await records.latest(place, guest_id)


# The places of a claim, in their order, and the generation that each of them ends with.
STEPS: dict[str, tuple[Step, int]] = {
    "stage": (stage, 1),
    "claim": (claim, 2),
    "second record": (say_that_it_runs, 3),
    "latest": (latest, 3),
}


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
    return "g-" + "".join(c if c.isalnum() else "-" for c in request.node.name)[-100:]


@asynccontextmanager
async def records_in(*urls: str, timeout_s: float = TIMEOUT_S) -> AsyncIterator[EtcdRecords]:
    records = EtcdRecords(place_of(*urls, timeout_s=timeout_s))
    try:
        yield records
    finally:
        await records.aclose()


def in_order(first: Member, cluster: Cluster) -> tuple[str, ...]:
    """The endpoints, one of them first."""
    return (first.url, *(url for url in cluster.urls if url != first.url))


async def prepare(records: EtcdRecords, guest_id: str, before: int) -> str:
    """Have a guest at the place of a claim where `before` generations stand."""
    place = await records.place()
    for generation in range(1, before + 1):
        await records.claim(place, record(guest_id, generation, "host-a" if generation == 1 else "host-b"))
    return place


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
    take, generation = STEPS[step]
    before = generation if step in ("stage", "latest") else generation - 1
    async with records_in(*cluster.urls) as others:
        place = await prepare(others, guest_id, before)
        lost = await run_sync(fault, cluster)
        # It is the one that is asked first.
        async with records_in(*in_order(lost, cluster)) as records:
            with anyio.fail_after(len(cluster.urls) * TIMEOUT_S + SLACK_S):
                standing = await take(records, place, guest_id, "host-b")
            if standing is not None:
                assert (standing.generation, standing.owner) == (generation, "host-b")
            # What the lost one had of it comes late or never, and changes nothing.
            await run_sync(cluster.heal)
            for url in cluster.urls:
                async with records_in(url) as alone:
                    found = await alone.latest(place, guest_id)
                    assert found is not None
                    assert found.generation == generation


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


def lines_of(*urls: str) -> str:
    """What an agent's configuration says of these endpoints."""
    listed = ", ".join(f'"{url}"' for url in urls)
    return f'endpoints = [{listed}]\ntimeout = "{TIMEOUT_S:g}s"'


# Once is enough for what takes its time.
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
            report = report_of(await fleet.follow("host-a", job))
            assert report.phase is Phase.COMPLETE, report.error
            assert report.downtime is not None
            assert report.downtime.total_s < len(cluster.urls) * TIMEOUT_S + SLACK_S
            assert report.source_digest == report.destination_digest
            assert faults == [moment]
            await fleet.check_runs_only_at("host-b", guest)
            await run_sync(cluster.heal)
            # The word that it runs may take some tries; until then the guest is not given to another move.
            assert (await fleet.follow("host-b", job)).phase is Phase.COMPLETE
            back = report_of(await fleet.move("worker", "host-b", "host-a"))
            assert back.phase is Phase.COMPLETE, back.error
            await fleet.check_runs_only_at("host-a", guest)
            async with records_in(*cluster.urls) as records:
                newest = await records.latest(await records.place(), guest)
            assert newest is not None
            assert newest.owner == "host-a"
