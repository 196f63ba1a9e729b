from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.ownership.files import KEPT_RECORDS, OWNERSHIP_DIR, FileRecords
from agents.ownership.threads import StorageThreads
from agents.storage import SharedDirs
from agents.storageproof.probes import MAX_PROBE_BYTES, PROBE_PREFIX
from migrate.errors import NotRecorded, StorageFailed
from migrate.facts import CpuFacts, DiskFacts, GuestFacts
from migrate.ownership import Ownership, RecordInvalid, format_record, next_generation, record_name
from migrate.preflight import Probe

pytestmark = pytest.mark.anyio

GUEST_ID = "11111111-2222-3333-4444-555555555555"
CLAIMERS = 16


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


@pytest.fixture
def storage(shared: Path) -> SharedDirs:
    return SharedDirs([shared])


@pytest.fixture
def records(shared: Path) -> Path:
    """The ownership directory, as a first claim would make it."""
    folder = shared / OWNERSHIP_DIR
    folder.mkdir()
    return folder


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 pages."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs root, and a container that lets it mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def record(generation: int = 1, owner: str = "host-a", migration_id: str = "m-1") -> Ownership:
    return Ownership(guest_id=GUEST_ID, generation=generation, owner=owner, migration_id=migration_id)


def disk(path: Path, name: str = "disk0") -> DiskFacts:
    return DiskFacts(name=name, path=str(path), size_bytes=0, is_read_only=False)


def write_record(folder: Path, wanted: Ownership) -> Path:
    path = folder / record_name(wanted.guest_id, wanted.generation)
    path.write_bytes(format_record(wanted))
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------- claims


async def test_a_claim_that_nobody_made_before_is_ours_and_can_be_read_by_the_other_host(
    storage: SharedDirs, shared: Path
) -> None:
    directory = str(shared / OWNERSHIP_DIR)
    assert await storage.latest(directory, GUEST_ID) is None
    assert await storage.claim(directory, record()) == record()
    assert await SharedDirs([shared]).latest(directory, GUEST_ID) == record()
    assert names_in(shared / OWNERSHIP_DIR) == [record_name(GUEST_ID, 1)]


async def test_a_generation_that_is_taken_is_not_taken_twice(storage: SharedDirs, records: Path) -> None:
    write_record(records, record(1))
    theirs = record(2, "host-b")
    assert await storage.claim(str(records), theirs) == theirs
    assert await storage.claim(str(records), record(2, "host-a")) == theirs
    assert names_in(records) == [record_name(GUEST_ID, 1), record_name(GUEST_ID, 2)]


async def test_nothing_is_claimed_where_the_record_of_before_is_not_shown(
    storage: SharedDirs, records: Path
) -> None:
    # An empty mount point: every host that has one would win there.
    with pytest.raises(NotRecorded, match="mounted"):
        await storage.claim(str(records), record(2))
    assert names_in(records) == []


async def test_our_own_record_of_a_claim_whose_answer_was_lost_is_ours(
    storage: SharedDirs, records: Path
) -> None:
    write_record(records, record(2))
    assert await storage.claim(str(records), record(2)) == record(2)


def test_of_many_who_claim_at_once_exactly_one_wins(shared: Path) -> None:
    (shared / OWNERSHIP_DIR).mkdir()
    write_record(shared / OWNERSHIP_DIR, record(1))
    directory = str(shared / OWNERSHIP_DIR)
    start = threading.Barrier(CLAIMERS)

    def claim(number: int) -> tuple[Ownership, Ownership]:
        wanted = record(2, f"host-{number}", f"m-{number}")
        start.wait()
        return wanted, anyio.run(SharedDirs([shared]).claim, directory, wanted)

    with ThreadPoolExecutor(CLAIMERS) as pool:
        outcomes = list(pool.map(claim, range(CLAIMERS)))
    assert sum(wanted == standing for wanted, standing in outcomes) == 1
    assert len({standing for _, standing in outcomes}) == 1
    assert names_in(shared / OWNERSHIP_DIR) == [record_name(GUEST_ID, 1), record_name(GUEST_ID, 2)]


async def test_a_claim_of_a_generation_long_gone_is_withdrawn_and_the_newest_stands(
    storage: SharedDirs, records: Path
) -> None:
    newest = record(9, "host-b", "m-9")
    write_record(records, newest)
    assert await storage.claim(str(records), record(3)) == newest
    assert names_in(records) == [record_name(GUEST_ID, 9)]


async def test_a_late_claim_takes_nobody_elses_old_record_away(storage: SharedDirs, records: Path) -> None:
    write_record(records, record(3, "host-c"))
    write_record(records, record(4, "host-b"))
    await storage.claim(str(records), record(3, "host-a"))
    assert names_in(records) == [record_name(GUEST_ID, 3), record_name(GUEST_ID, 4)]


async def test_old_generations_are_cleared_and_the_newest_never(storage: SharedDirs, records: Path) -> None:
    other = replace(record(1), guest_id="another-guest")
    write_record(records, other)
    current = await storage.claim(str(records), record(1))
    for number in range(2, 8):
        current = await storage.claim(str(records), next_generation(current, "host-a", f"m-{number}"))
    assert len(names_in(records)) == 8
    await storage.tidy(str(records), GUEST_ID)
    await storage.tidy(str(records / "nowhere"), GUEST_ID)
    kept = [record_name(GUEST_ID, number) for number in range(8 - KEPT_RECORDS, 8)]
    assert names_in(records) == sorted([*kept, record_name(other.guest_id, 1)])
    assert await storage.latest(str(records), GUEST_ID) == current


async def test_generations_are_ordered_as_numbers(storage: SharedDirs, records: Path) -> None:
    for generation in (9, 10, 100):
        write_record(records, record(generation))
    assert await storage.latest(str(records), GUEST_ID) == record(100)


@pytest.mark.parametrize("content", [b"", b"vmferry-ownership 1\nguest", b"\0" * 4096, b"\xff\xfe"])
async def test_a_torn_record_is_nobodys(storage: SharedDirs, records: Path, content: bytes) -> None:
    write_record(records, record(1))
    (records / record_name(GUEST_ID, 2)).write_bytes(content)
    with pytest.raises(RecordInvalid):
        await storage.latest(str(records), GUEST_ID)
    with pytest.raises(RecordInvalid):
        await storage.claim(str(records), record(2))


async def test_a_record_under_the_name_of_another_generation_is_refused(
    storage: SharedDirs, records: Path
) -> None:
    (records / record_name(GUEST_ID, 7)).write_bytes(format_record(record(6)))
    with pytest.raises(RecordInvalid, match="another guest or generation"):
        await storage.latest(str(records), GUEST_ID)


async def test_a_pipe_a_link_or_a_directory_in_place_of_a_record_is_refused_and_not_waited_for(
    storage: SharedDirs, records: Path, tmp_path: Path
) -> None:
    path = records / record_name(GUEST_ID, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(format_record(record(1)))
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(elsewhere, path)):
        make(path)
        with anyio.fail_after(5), pytest.raises(StorageFailed):
            await storage.latest(str(records), GUEST_ID)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("guest_id", ["../../etc/passwd", "", ".", "a/b", "a\0b", "x" * 129])
async def test_a_guest_identity_that_names_another_file_is_refused(
    storage: SharedDirs, records: Path, guest_id: str
) -> None:
    with pytest.raises(RecordInvalid):
        await storage.latest(str(records), guest_id)
    with pytest.raises(RecordInvalid):
        await storage.claim(str(records), replace(record(), guest_id=guest_id))
    assert names_in(records) == []


async def test_a_full_disk_makes_no_record_and_says_so(tiny_disk: Path) -> None:
    storage = SharedDirs([tiny_disk])
    directory = str(tiny_disk / OWNERSHIP_DIR)
    await storage.claim(directory, record(1))
    with contextlib.suppress(OSError), (tiny_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(NotRecorded, match="No space left"):
        await storage.claim(directory, record(2, "host-b"))
    assert await storage.latest(directory, GUEST_ID) == record(1)
    assert names_in(tiny_disk / OWNERSHIP_DIR) == [record_name(GUEST_ID, 1)]
    assert "No space left" in (await storage.check_ownership_dir(directory, facts_with()) or "")
    probes, nonces = await storage.plant([disk(tiny_disk / "guest.img")])
    assert nonces == {}
    assert [(probe.path, probe.error) for probe in probes] == [("", "No space left on device")]


async def test_a_disk_that_takes_a_part_of_a_record_makes_none(storage: SharedDirs, records: Path) -> None:
    # A write beyond the limit is cut short at it; only the next one fails.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(StorageFailed):
            await storage.claim(str(records), record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(records) == []


async def test_a_read_only_disk_is_said_and_can_still_be_read(tiny_disk: Path) -> None:
    storage = SharedDirs([tiny_disk])
    directory = str(tiny_disk / OWNERSHIP_DIR)
    await storage.claim(directory, record(1))
    probes, _ = await storage.plant([disk(tiny_disk / "guest.img")])
    await anyio.run_process(["mount", "-o", "remount,ro", str(tiny_disk)])
    assert "Read-only" in (await storage.check_ownership_dir(directory, facts_with()) or "")
    with pytest.raises(NotRecorded, match="Read-only"):
        await storage.claim(directory, record(2))
    assert await storage.latest(directory, GUEST_ID) == record(1)
    await storage.clear(probes)  # cannot, and that ends nothing
    (probe,), nonces = await storage.plant([disk(tiny_disk / "guest.img")])
    assert (probe.path, probe.error, nonces) == ("", "Read-only file system", {})


async def test_a_staged_claim_decides_nothing_and_the_claim_needs_no_new_file(shared: Path) -> None:
    storage, directory = SharedDirs([shared]), shared / OWNERSHIP_DIR
    await storage.stage_claim(str(directory), record(1))
    assert await storage.latest(str(directory), GUEST_ID) is None
    staged = names_in(directory)
    assert len(staged) == 1
    written = (directory / staged[0]).stat().st_ino
    assert await storage.claim(str(directory), record(1)) == record(1)
    assert [path.stat().st_ino for path in directory.iterdir()] == [written]
    await storage.unstage_claim(str(directory), record(1))
    assert await storage.latest(str(directory), GUEST_ID) == record(1)


async def test_a_staged_claim_that_is_not_made_leaves_nothing(shared: Path) -> None:
    storage, directory = SharedDirs([shared]), str(shared / OWNERSHIP_DIR)
    await storage.stage_claim(directory, record(1))
    await storage.stage_claim(directory, record(1))
    await storage.unstage_claim(directory, record(1))
    await storage.unstage_claim(directory, record(1))
    assert names_in(shared / OWNERSHIP_DIR) == []


async def test_a_staged_claim_of_a_generation_that_is_taken_loses(shared: Path) -> None:
    storage, directory = SharedDirs([shared]), str(shared / OWNERSHIP_DIR)
    late = replace(record(1), owner="host-z")
    await storage.stage_claim(directory, late)
    assert await storage.claim(directory, record(1)) == record(1)
    assert await storage.claim(directory, late) == record(1)
    assert len(names_in(shared / OWNERSHIP_DIR)) == 1


class HangingDirs(FileRecords):
    """A storage server that does not answer until it is told to."""

    def __init__(self, shared: Path) -> None:
        super().__init__([shared], StorageThreads(0.02))
        self.answers = threading.Event()
        self.has_claimed = threading.Event()

    def _claim(self, folder: Path, wanted: Ownership, staged: Path | None) -> Ownership:
        self.answers.wait(30)
        try:
            return super()._claim(folder, wanted, staged)
        finally:
            self.has_claimed.set()


async def test_storage_that_hangs_fails_in_time_and_takes_no_thread_of_others(shared: Path) -> None:
    hanging = HangingDirs(shared)
    try:
        async with anyio.create_task_group() as tasks:

            async def claim() -> None:
                with pytest.raises(StorageFailed, match="did not answer within"):
                    await hanging.claim(str(shared / OWNERSHIP_DIR), record())

            # More than there are threads for everybody.
            for _ in range(60):
                tasks.start_soon(claim)
        with anyio.fail_after(5):
            assert await anyio.to_thread.run_sync(lambda: "well") == "well"
    finally:
        hanging.answers.set()


async def test_a_claim_that_hung_may_have_been_made_and_is_found_later(shared: Path) -> None:
    hanging = HangingDirs(shared)
    directory = str(shared / OWNERSHIP_DIR)
    with pytest.raises(StorageFailed):
        await hanging.claim(directory, record(1))
    assert await SharedDirs([shared]).latest(directory, GUEST_ID) is None
    hanging.answers.set()
    assert await anyio.to_thread.run_sync(hanging.has_claimed.wait, 5)
    assert await SharedDirs([shared]).latest(directory, GUEST_ID) == record(1)


# ---------------------------------------------------------------------- the ownership directory


def facts_with(*disks: DiskFacts) -> GuestFacts:
    return GuestFacts(
        guest_id=GUEST_ID,
        name="guest",
        hypervisor="embedded",
        is_running=True,
        machine="embedded-1",
        blocks=(),
        cpu=CpuFacts(model="Haswell", features=()),
        disks=disks,
        spec=b"",
    )


async def test_records_belong_beside_the_first_disk_or_else_in_the_first_shared_directory(
    storage: SharedDirs, shared: Path
) -> None:
    (shared / "web").mkdir()
    beside = facts_with(disk(shared / "web" / "a.img"), disk(shared / "b.img"))
    assert await storage.ownership_dir(beside) == str(shared / "web" / OWNERSHIP_DIR)
    assert await storage.ownership_dir(facts_with()) == str(shared / OWNERSHIP_DIR)


async def test_a_directory_where_records_can_be_kept_is_accepted_and_left_clean(
    storage: SharedDirs, shared: Path
) -> None:
    assert await storage.check_ownership_dir(str(shared / OWNERSHIP_DIR), facts_with()) is None
    assert names_in(shared / OWNERSHIP_DIR) == []


async def test_no_directory_outside_of_the_shared_ones_is_touched(
    storage: SharedDirs, shared: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / OWNERSHIP_DIR).mkdir(parents=True)
    (shared / "link").symlink_to(outside)
    (shared / "sub").mkdir()
    (shared / "sub" / OWNERSHIP_DIR).symlink_to(outside / OWNERSHIP_DIR)
    before = os.stat(outside / OWNERSHIP_DIR).st_mtime_ns
    for hostile in (
        str(outside / OWNERSHIP_DIR),
        f"{shared}/../outside/{OWNERSHIP_DIR}",
        f"{shared}/link/{OWNERSHIP_DIR}",
        f"{shared}/sub/{OWNERSHIP_DIR}",
        f"{shared}/{OWNERSHIP_DIR}/..",
        f"{shared}sibling/{OWNERSHIP_DIR}",
        OWNERSHIP_DIR,
        str(shared),
        "",
        "/",
        f"{shared}/\0/{OWNERSHIP_DIR}",
        f"{shared}/{'x' * 300}/{OWNERSHIP_DIR}",
    ):
        assert await storage.check_ownership_dir(hostile, facts_with()) is not None, hostile
    assert os.stat(outside / OWNERSHIP_DIR).st_mtime_ns == before
    assert not (shared / OWNERSHIP_DIR).exists()


# ---------------------------------------------------------------------- probes


async def test_a_nonce_beside_a_disk_is_read_by_the_other_host_and_cleared(
    storage: SharedDirs, shared: Path
) -> None:
    probes, nonces = await storage.plant([disk(shared / "a.img", "a"), disk(shared / "b.img", "b")])
    readings = await SharedDirs([shared]).read_probes(probes)
    assert {reading.disk: reading.content for reading in readings} == nonces
    assert nonces["a"] != nonces["b"]
    await storage.clear(probes)
    await storage.clear(probes)
    assert names_in(shared) == []


async def test_a_disk_beside_which_nothing_can_be_written_has_no_nonce(
    storage: SharedDirs, shared: Path
) -> None:
    probes, nonces = await storage.plant(
        [disk(shared / "nowhere" / "a.img", "a"), disk(shared / "b.img", "b")]
    )
    assert [(probe.disk, bool(probe.path), bool(probe.error)) for probe in probes] == [
        ("a", False, True),
        ("b", True, False),
    ]
    assert set(nonces) == {"b"}


async def test_probes_that_are_no_small_file_of_ours_are_refused_and_not_waited_for(
    storage: SharedDirs, shared: Path, tmp_path: Path
) -> None:
    secret = tmp_path / f"{PROBE_PREFIX}secret"
    secret.write_bytes(b"secret")
    (shared / "link").symlink_to(tmp_path)
    (shared / f"{PROBE_PREFIX}link").symlink_to(secret)
    os.mkfifo(shared / f"{PROBE_PREFIX}pipe")
    (shared / f"{PROBE_PREFIX}folder").mkdir()
    (shared / "private.key").write_bytes(b"secret")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(shared / f"{PROBE_PREFIX}s"))
    hostile = [
        str(secret),
        f"{shared}/../{secret.name}",
        f"{shared}/link/{secret.name}",
        f"{shared}/{PROBE_PREFIX}link",
        f"{shared}/{PROBE_PREFIX}pipe",
        f"{shared}/{PROBE_PREFIX}folder",
        f"{shared}/{PROBE_PREFIX}s",
        f"{shared}/{PROBE_PREFIX}nobody",
        f"{shared}/private.key",
        f"{PROBE_PREFIX}relative",
        f"{shared}/{PROBE_PREFIX}\0",
        f"{shared}/{PROBE_PREFIX}{'x' * 300}",
        "",
    ]
    with anyio.fail_after(5):
        readings = await storage.read_probes([Probe(disk="d", path=path) for path in hostile])
    for path, reading in zip(hostile, readings, strict=True):
        assert reading.content is None, path
        assert reading.error, path


async def test_a_huge_file_in_place_of_a_probe_is_read_no_further_than_the_limit(
    storage: SharedDirs, shared: Path
) -> None:
    with (shared / f"{PROBE_PREFIX}huge").open("wb") as huge:
        huge.truncate(1 << 40)
    (reading,) = await storage.read_probes([Probe(disk="d", path=f"{shared}/{PROBE_PREFIX}huge")])
    assert reading.content == bytes(MAX_PROBE_BYTES)


@settings(max_examples=60, deadline=None)
@given(paths=st.lists(st.text(max_size=40), max_size=5), directory=st.text(max_size=40))
def test_no_path_of_a_peer_raises(paths: list[str], directory: str) -> None:
    async def ask() -> None:
        storage = SharedDirs([Path("/nonexistent-shared-directory")])
        readings = await storage.read_probes([Probe(disk="d", path=path) for path in paths])
        assert all(reading.error for reading in readings)
        assert await storage.check_ownership_dir(directory, facts_with())

    anyio.run(ask)
