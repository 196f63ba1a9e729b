"""Claims of a guest in a cluster of etcds, of which something may be lost at each place: what their tests share.

Law: asserts; whoever calls loses members, or parts them, and has them well at the beginning.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.to_thread import run_sync

from agents.ownership.etcd import EtcdRecords
from migrate.ownership import Ownership
from migrate.phases import Phase
from migrate.stats import Report
from tests.agents.etcds import Cluster, Member, place_of
from tests.agents.host.fleet import Fleet, report_of

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


def guest_named_by(request: pytest.FixtureRequest) -> str:
    """A guest of one test alone."""
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


def lines_of(*urls: str) -> str:
    """What an agent's configuration says of these endpoints."""
    listed = ", ".join(f'"{url}"' for url in urls)
    return f'endpoints = [{listed}]\ntimeout = "{TIMEOUT_S:g}s"'


async def check_step(cluster: Cluster, guest_id: str, lose: Callable[[Cluster], Member], step: str) -> None:
    """Insist that a step succeeds within the timeouts though the member that `lose` gives is asked first."""
    take, generation = STEPS[step]
    before = generation if step in ("stage", "latest") else generation - 1
    async with records_in(*cluster.urls) as others:
        place = await prepare(others, guest_id, before)
        lost = await run_sync(lose, cluster)
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


async def check_there_and_back(fleet: Fleet, cluster: Cluster, guest: str, job: str) -> Report:
    """Insist that a move to host-b succeeds though a member is lost, and one back when all are well; give the first."""
    report = report_of(await fleet.follow("host-a", job))
    assert report.phase is Phase.COMPLETE, report.error
    assert report.source_digest == report.destination_digest
    await fleet.check_runs_only_at("host-b", guest)
    await run_sync(cluster.heal)
    # The word that it runs may take some tries; until then the guest is not given to another move.
    assert (await fleet.follow("host-b", job)).phase is Phase.COMPLETE
    back = report_of(await fleet.move("worker", "host-b", "host-a"))
    assert back.phase is Phase.COMPLETE, back.error
    await fleet.check_runs_only_at("host-a", guest)
    return report
