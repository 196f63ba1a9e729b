from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from agents.ownership.etcd import EtcdRecords, _put
from agents.ownership.gateway import Gateway
from agents.ownership.place import EtcdPlace
from agents.storage import SharedDirs
from migrate.errors import NotRecorded, StorageFailed
from migrate.facts import DiskFacts, GuestFacts
from migrate.ownership import Ownership, RecordInvalid, record_name
from migrate.phases import Phase
from migrate.preflight import RECORDS, Probe
from tests.agents.etcds import Etcd, losing_proxy, place_of, running_etcd
from tests.agents.host.fleet import free_port, report_of, running_fleet, scratch_folder
from tests.migrate.world import FACTS
from tests.transport.certificates import Authority

pytestmark = pytest.mark.anyio

CLIENTS = 8


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def guest_id(request: pytest.FixtureRequest) -> str:
    """A guest of this test alone."""
    return "g-" + "".join(c if c.isalnum() else "-" for c in request.node.name)[-100:]


@asynccontextmanager
async def records_in(place: EtcdPlace) -> AsyncIterator[EtcdRecords]:
    records = EtcdRecords(place)
    try:
        yield records
    finally:
        await records.aclose()


def record(guest_id: str, generation: int, owner: str = "host-a") -> Ownership:
    return Ownership(guest_id=guest_id, generation=generation, owner=owner, migration_id="m-1")


async def test_of_many_clients_who_claim_at_once_exactly_one_wins(etcd: Etcd, guest_id: str) -> None:
    async with records_in(place_of(etcd.url)) as first:
        place = await first.place()
        await first.claim(place, record(guest_id, 1))
    standing: dict[str, Ownership] = {}

    async def claim(owner: str) -> None:
        async with records_in(place_of(etcd.url)) as records:
            standing[owner] = await records.claim(place, record(guest_id, 2, owner))

    async with anyio.create_task_group() as tasks:
        for number in range(CLIENTS):
            tasks.start_soon(claim, f"host-{number}")
    assert len(standing) == CLIENTS
    assert len(set(standing.values())) == 1
    assert [owner for owner, found in standing.items() if found.owner == owner] == [standing["host-0"].owner]


async def test_an_etcd_has_one_identity_whoever_asks_first(etcd: Etcd) -> None:
    async with records_in(place_of(etcd.url)) as one, records_in(place_of(etcd.url)) as other:
        assert await one.place() == await other.place()


async def test_records_follow_each_other_and_old_ones_are_cleared(etcd: Etcd, guest_id: str) -> None:
    async with records_in(place_of(etcd.url)) as records:
        place = await records.place()
        assert await records.latest(place, guest_id) is None
        with pytest.raises(NotRecorded, match="does not show generation 1"):
            await records.claim(place, record(guest_id, 2))
        for generation in range(1, 12):
            await records.claim(place, record(guest_id, generation))
        await records.tidy(place, guest_id)
        newest = record(guest_id, 11)
        assert await records.latest(place, guest_id) == newest
        # Long gone, and so are those before them.
        assert await records.claim(place, record(guest_id, 1, "host-z")) == newest
        assert await records.claim(place, record(guest_id, 5, "host-z")) == newest
        assert await records.latest(place, f"{guest_id[:-1]}") is None


async def test_a_record_that_is_none_is_said_and_clearing_old_ones_passes_over_it(
    etcd: Etcd, guest_id: str, tmp_path: Path
) -> None:
    async with records_in(place_of(etcd.url)) as records:
        place = await records.place()
        await records.claim(place, record(guest_id, 1))
        key = f"{place_of(etcd.url).prefix}/records/{record_name(guest_id, 2)}"
        gateway = Gateway(place_of(etcd.url))
        await gateway.txn({"success": [_put(key.encode(), b"not a record")]})
        await gateway.aclose()
        storage = SharedDirs([tmp_path], etcd=records)
        with pytest.raises(RecordInvalid):
            await storage.latest(place, guest_id)
        await storage.tidy(place, guest_id)


async def test_an_answer_that_is_lost_is_found_out_by_asking_again(etcd: Etcd, guest_id: str) -> None:
    async with losing_proxy(etcd) as proxy, records_in(place_of(proxy.url, etcd.url)) as records:
        place = await records.place()
        await records.claim(place, record(guest_id, 1))
        proxy.loses = True
        assert await records.claim(place, record(guest_id, 2, "host-b")) == record(guest_id, 2, "host-b")
        assert proxy.lost == 1


async def test_a_claim_whose_answers_are_all_lost_is_unknown_and_stands(etcd: Etcd, guest_id: str) -> None:
    async with losing_proxy(etcd) as proxy, records_in(place_of(proxy.url)) as records:
        place = await records.place()
        await records.claim(place, record(guest_id, 1))
        proxy.loses = True
        with pytest.raises(StorageFailed) as failed:
            await records.claim(place, record(guest_id, 2, "host-b"))
        assert not isinstance(failed.value, NotRecorded)
        proxy.loses = False
        assert await records.claim(place, record(guest_id, 2)) == record(guest_id, 2, "host-b")


async def test_a_member_that_is_down_is_passed_over(etcd: Etcd, guest_id: str) -> None:
    down = f"http://127.0.0.1:{free_port()}"
    async with records_in(place_of(down, etcd.url)) as records:
        place = await records.place()
        assert await records.claim(place, record(guest_id, 1)) == record(guest_id, 1)
    async with records_in(place_of(down)) as records:
        with pytest.raises(NotRecorded, match="gave no answer"):
            await records.claim(place, record(guest_id, 2))


async def test_a_member_that_says_nothing_is_waited_for_no_longer_than_configured(
    etcd: Etcd, guest_id: str
) -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as silent:
        url = f"http://127.0.0.1:{silent.extra(anyio.abc.SocketAttribute.local_port)}"
        async with records_in(place_of(etcd.url)) as records:
            place = await records.place()
        async with records_in(place_of(url, timeout_s=0.05)) as records:
            with (
                anyio.fail_after(5),
                pytest.raises(StorageFailed, match=r"no answer within 0\.05 s") as failed,
            ):
                await records.claim(place, record(guest_id, 1))
        assert not isinstance(failed.value, NotRecorded)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b" " * 100_000,
        b"HTTP/1.1 503 No\r\nContent-Length: 13\r\n\r\n" + b'{"error":"x"}',
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 41\r\n\r\n{"responses":[{"response_range":{"kvs":7}}',
    ],
)
async def test_what_is_no_etcd_decides_nothing(guest_id: str, answer: bytes) -> None:
    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(answer)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    url = f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
    place = "etcd:/vmferry#00"
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        async with records_in(place_of(url, timeout_s=1)) as records:
            for ask in (records.latest(place, guest_id), records.claim(place, record(guest_id, 1))):
                with pytest.raises(StorageFailed) as failed:
                    await ask
                assert not isinstance(failed.value, NotRecorded)
        tasks.cancel_scope.cancel()


@pytest.mark.slow
async def test_another_etcd_and_another_prefix_are_refused(etcd: Etcd, guest_id: str, tmp_path: Path) -> None:
    async with records_in(place_of(etcd.url)) as records:
        place = await records.place()
        assert await records.check(place, guest_id) is None
        probe = await records.plant(b"nonce")
        assert await records.read_probe(probe) == b"nonce"
        for hostile in (
            "etcd:",
            "etcd:/vmferry",
            "etcd:/vmferry#",
            "etcd:/other#00",
            f"{place}0",
            "etcd:\0#",
        ):
            assert await records.check(hostile, guest_id) is not None
            with pytest.raises(StorageFailed):
                await records.claim(hostile, record(guest_id, 1))
        assert await records.check(place, "../x") is not None
        with pytest.raises(RecordInvalid):
            await records.latest(place, "../x")
        with pytest.raises(StorageFailed):
            await records.read_probe("etcd:/vmferry/identity")
        with running_etcd(tmp_path) as other:
            async with records_in(place_of(other.url)) as elsewhere:
                assert await elsewhere.read_probe(probe) is None
                assert await elsewhere.check(place, guest_id) is not None
                with pytest.raises(StorageFailed, match="another etcd"):
                    await elsewhere.latest(place, guest_id)
                with pytest.raises(StorageFailed, match="another etcd"):
                    await elsewhere.claim(place, record(guest_id, 1))
        await records.clear_probe(probe)
        assert await records.read_probe(probe) is None


@pytest.mark.slow
async def test_certificates_are_looked_at_from_both_ends(tmp_path: Path, guest_id: str) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    server = ours.issue(address="127.0.0.1")
    with running_etcd(tmp_path, tls=server) as etcd:
        async with records_in(place_of(etcd.url, tls=ours.issue("vmferry://agent/host-a"))) as records:
            place = await records.place()
            assert await records.claim(place, record(guest_id, 1)) == record(guest_id, 1)
        wrong = {
            "a client of another CA": theirs.issue("vmferry://agent/host-a", trusts=ours.certificate),
            "a server of another CA": ours.issue("vmferry://agent/host-a", trusts=theirs.certificate),
        }
        for name, files in wrong.items():
            async with records_in(place_of(etcd.url, tls=files)) as records:
                with pytest.raises(StorageFailed):
                    await records.claim(place, record(guest_id, 2, "host-b"))
                assert await records.check(place, guest_id) is not None, name
        # None of them was heard.
        async with records_in(place_of(etcd.url, tls=ours.issue("vmferry://agent/host-b"))) as records:
            assert await records.latest(place, guest_id) == record(guest_id, 1)


def facts_with(*paths: Path) -> GuestFacts:
    disks = (
        DiskFacts(name=f"disk{at}", path=str(p), size_bytes=0, is_read_only=False)
        for at, p in enumerate(paths)
    )
    return replace(FACTS, disks=tuple(disks))


async def test_records_are_in_etcd_exactly_where_no_file_below_a_shared_directory_is_the_first_disk(
    etcd: Etcd, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    async with records_in(place_of(etcd.url)) as records:
        with_etcd, without = SharedDirs([shared], etcd=records), SharedDirs([shared])
        beside = facts_with(shared / "a.img")
        for storage in (with_etcd, without):
            assert await storage.ownership_dir(beside) == str(shared / ".vmferry")
            assert await storage.check_ownership_dir(str(shared / ".vmferry"), beside) is None
        place = await records.place()
        for guest in (facts_with(), facts_with(Path("/dev/vda")), facts_with(tmp_path / "b.img")):
            assert await with_etcd.ownership_dir(guest) == place
            assert await with_etcd.check_ownership_dir(place, guest) is None
            # A host that would look elsewhere is no host to move to, whichever of the two it is.
            assert "no [storage.etcd]" in (await without.check_ownership_dir(place, guest) or "")
            assert "no [storage.etcd]" in (
                await with_etcd.check_ownership_dir(str(shared / ".vmferry"), guest) or ""
            )
        with pytest.raises(StorageFailed, match="any more"):
            await without.latest(place, FACTS.guest_id)


async def test_a_record_from_before_there_was_an_etcd_still_counts(etcd: Etcd, tmp_path: Path) -> None:
    await SharedDirs([tmp_path]).claim(str(tmp_path / ".vmferry"), record("older-guest", 1))
    async with records_in(place_of(etcd.url)) as records:
        storage = SharedDirs([tmp_path], etcd=records)
        with pytest.raises(StorageFailed, match="from before"):
            await storage.latest(await records.place(), "older-guest")


async def test_a_nonce_in_etcd_is_read_at_the_other_end_and_cleared(etcd: Etcd, tmp_path: Path) -> None:
    async with records_in(place_of(etcd.url)) as near, records_in(place_of(etcd.url)) as far:
        source, destination = SharedDirs([tmp_path], etcd=near), SharedDirs([tmp_path], etcd=far)
        _, beside = await source.plant(facts_with(tmp_path / "a.img").disks)
        assert RECORDS not in beside
        probes, nonces = await source.plant([])
        (reading,) = await destination.read_probes(probes)
        assert reading.content == nonces[RECORDS]
        (without,) = await SharedDirs([tmp_path]).read_probes(probes)
        assert "no [storage.etcd]" in (without.error or "")
        (hostile,) = await destination.read_probes([Probe(disk=RECORDS, path="etcd:/vmferry/identity")])
        assert hostile.content is None
        await source.clear(probes)
        (gone,) = await destination.read_probes(probes)
        assert gone.content is None
    async with records_in(place_of(f"http://127.0.0.1:{free_port()}")) as down:
        probes, nonces = await SharedDirs([tmp_path], etcd=down).plant([])
        assert (probes, set(nonces)) == ((), {RECORDS})


@pytest.mark.slow
async def test_a_guest_without_a_disk_moves_there_and_back_with_its_record_in_etcd(etcd: Etcd) -> None:
    with scratch_folder() as folder:
        async with running_fleet(folder, etcd=f'endpoints = ["{etcd.url}"]') as fleet:
            guest = fleet.start_guest("host-a", disk_path=None).guest_id
            there = report_of(await fleet.move("worker", "host-a", "host-b"))
            assert (there.phase, there.error) == (Phase.COMPLETE, None)
            await fleet.check_runs_only_at("host-b", guest)
            back = report_of(await fleet.move("worker", "host-b", "host-a"))
            assert back.phase is Phase.COMPLETE
            async with records_in(place_of(etcd.url)) as records:
                newest = await records.latest(await records.place(), guest)
            assert newest is not None
            # A claim and the word that the guest runs, there and back.
            assert (newest.generation, newest.owner) == (5, "host-a")
            assert not list(fleet.shared.rglob(f"{guest}.*"))
