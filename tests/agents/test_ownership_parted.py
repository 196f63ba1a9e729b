"""A cluster of three etcds in two halves that live on and answer whoever asks them: one half alone has a say."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import anyio
import pytest
from anyio.to_thread import run_sync

from agents.ownership.etcd import EtcdRecords
from migrate.errors import NotRecorded, StorageFailed
from migrate.ownership import Ownership
from migrate.phases import Phase
from tests.agents.claims import (
    STEPS,
    check_step,
    check_there_and_back,
    claim,
    guest_named_by,
    lines_of,
    prepare,
    record,
    records_in,
)
from tests.agents.etcds import MEMBERS, Cluster, Member, running_cluster
from tests.agents.host.fleet import report_of, running_fleet, scratch_folder
from tests.agents.parted import networks_of
from tests.waiting import until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt,
]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with (
        networks_of(MEMBERS) as networks,
        running_cluster(tmp_path_factory.mktemp("cluster"), networks) as cluster,
    ):
        yield cluster


@pytest.fixture
def cluster(members: Cluster) -> Iterator[Cluster]:
    members.heal()
    yield members
    members.heal()


@pytest.fixture
def guest_id(request: pytest.FixtureRequest) -> str:
    return guest_named_by(request)


def part_the_leader(cluster: Cluster) -> Member:
    leader = cluster.leader()
    cluster.part(leader)
    return leader


def part_a_follower(cluster: Cluster) -> Member:
    follower = cluster.followers()[0]
    cluster.part(follower)
    return follower


Part = Callable[[Cluster], Member]
PARTS: tuple[Part, ...] = (part_the_leader, part_a_follower)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
async def test_every_step_of_a_claim_succeeds_though_the_lone_half_is_asked_first(
    cluster: Cluster, guest_id: str, part: Part, step: str
) -> None:
    await check_step(cluster, guest_id, part, step)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
async def test_of_two_who_claim_in_two_halves_the_larger_ones_wins_and_the_other_knows_nothing(
    cluster: Cluster, guest_id: str, part: Part
) -> None:
    """The lone half was the leader: it holds the claim for committed by nobody, and must not say that it stands."""
    async with records_in(*cluster.urls) as before:
        place = await prepare(before, guest_id, 1)
    lone = await run_sync(part, cluster)
    others = [member.url for member in cluster.members if member is not lone]

    async def claim_alone() -> None:
        async with records_in(lone.url) as records:
            with pytest.raises(StorageFailed) as failed:
                await claim(records, place, guest_id, "host-a")
            assert not isinstance(failed.value, NotRecorded)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(claim_alone)
        async with records_in(*others) as records:
            won = await claim(records, place, guest_id, "host-b")
    assert won == record(guest_id, 2, "host-b")
    # It lives, believes that it leads for a while, and has the old record: it may not give that one away.
    async with records_in(lone.url) as records:
        with pytest.raises(StorageFailed):
            await records.latest(place, guest_id)
        await run_sync(cluster.heal)
        assert await records.latest(place, guest_id) == won
        assert await claim(records, place, guest_id, "host-a") == won


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
async def test_a_guest_moves_between_agents_that_see_both_halves(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, part: Part
) -> None:
    original = EtcdRecords.claim
    parted: list[Member] = []

    async def claim_when_parted(self: EtcdRecords, directory: str, wanted: Ownership) -> Ownership:
        if wanted.generation == 2 and not parted:
            parted.append(await run_sync(part, cluster))
        return await original(self, directory, wanted)

    monkeypatch.setattr(EtcdRecords, "claim", claim_when_parted)
    with scratch_folder() as folder:
        async with running_fleet(folder, etcd=lines_of(*cluster.urls)) as fleet:
            guest = fleet.start_guest("host-a", disk_path=None).guest_id
            job = await fleet.start("worker", "host-a", "host-b")
            await check_there_and_back(fleet, cluster, guest, job)
            assert parted


async def test_a_destination_in_the_lone_half_does_not_run_what_it_could_not_claim(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each agent reaches one member, and these are parted at the claim: the larger half is asked by the source."""
    original = EtcdRecords.claim
    here, lone = cluster.members[:2]
    parted: list[Member] = []

    async def claim_when_parted(self: EtcdRecords, directory: str, wanted: Ownership) -> Ownership:
        if wanted.generation == 2 and not parted:
            parted.append(lone)
            await run_sync(cluster.part, lone)
        return await original(self, directory, wanted)

    monkeypatch.setattr(EtcdRecords, "claim", claim_when_parted)
    endpoints = {"host-a": lines_of(here.url), "host-b": lines_of(lone.url)}
    with scratch_folder() as folder:
        async with running_fleet(folder, etcd=endpoints) as fleet:
            guest = fleet.start_guest("host-a", disk_path=None).guest_id
            job = await fleet.start("worker", "host-a", "host-b")
            report = report_of(await fleet.follow("host-a", job))
            assert parted
            assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a"), report.error
            await run_sync(cluster.heal)
            # The destination's claim has lost, and its machine goes as soon as it knows that.
            await until(
                lambda: not fleet.machines("host-b"), "the end of the destination's machine", within_s=30
            )
            await fleet.check_runs_only_at("host-a", guest)
