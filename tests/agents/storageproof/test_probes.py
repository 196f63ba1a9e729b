from __future__ import annotations

import os
import threading
from pathlib import Path

import anyio
import pytest

import agents.storage as storage_module
from agents.storage import SharedDirs
from agents.storageproof.places import SharedPlaces
from agents.storageproof.probes import MAX_PROBES, NONCE_BYTES, PROBE_PREFIX, answer
from migrate.facts import DiskFacts, DiskKind
from migrate.preflight import LockAnswer, Probe, Reading

pytestmark = pytest.mark.anyio


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "guest.raw"
    path.write_bytes(os.urandom(64 << 10))
    return path


def disk(path: Path | str, kind: DiskKind = DiskKind.FILE) -> DiskFacts:
    return DiskFacts(name="disk0", path=str(path), size_bytes=0, is_read_only=False, kind=kind)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_each_end_reads_what_the_other_wrote_and_nothing_stays(tmp_path: Path, image: Path) -> None:
    source, destination = SharedDirs([tmp_path]), SharedDirs([tmp_path])
    await source.look(())  # its thread and what it opens
    before = open_descriptors()
    probes, nonces = await source.plant([disk(image)])
    (mine,) = await source.look(probes)
    assert (mine.content, mine.echo) == (nonces["disk0"], b"")
    (theirs,) = await destination.read_probes(probes)
    assert (theirs.content, theirs.lock, theirs.echo_error) == (nonces["disk0"], LockAnswer.REFUSED, "")
    (again,) = await source.look(probes)
    assert (again.content, again.echo) == (nonces["disk0"], theirs.echo)
    assert len(theirs.echo) == NONCE_BYTES
    assert mine.image is not None
    assert theirs.image is not None
    assert mine.image.digests == theirs.image.digests != ()
    # Asked twice: what is in the probe stays, and is no second answer.
    (twice,) = await destination.read_probes(probes)
    assert not twice.echo
    await source.clear(probes)
    assert os.listdir(tmp_path) == ["guest.raw"]
    assert open_descriptors() == before


async def test_a_lock_that_nobody_holds_is_granted_and_given_back(tmp_path: Path, image: Path) -> None:
    source, destination = SharedDirs([tmp_path]), SharedDirs([tmp_path])
    probes, _ = await source.plant([disk(image)])
    copy = tmp_path / f"{PROBE_PREFIX}copy"
    copy.write_bytes(bytes(NONCE_BYTES))
    claimed = Probe(disk="disk0", path=str(copy), image=str(image), is_locked=True)
    (reading,) = await destination.read_probes([claimed])
    assert reading.lock is LockAnswer.GRANTED
    await source.clear(probes)


async def test_a_probe_is_looked_for_beside_the_disk_as_the_reader_finds_it(tmp_path: Path) -> None:
    """Two hosts may have one storage at two places, if the disk's path leads to it on both."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "guest.raw").write_bytes(bytes(4096))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    probes, nonces = await SharedDirs([tmp_path]).plant([disk(tmp_path / "link" / "guest.raw")])
    elsewhere = [
        Probe(disk=one.disk, path=f"/mnt/other/{Path(one.path).name}", image=one.image) for one in probes
    ]
    (reading,) = await SharedDirs([tmp_path]).read_probes(elsewhere)
    assert reading.content == nonces["disk0"]


async def test_what_is_at_no_path_has_no_probe(tmp_path: Path, image: Path) -> None:
    storage = SharedDirs([tmp_path])
    disks = [disk(image), disk("", DiskKind.EMPTY), disk("")]
    probes, nonces = await storage.plant(disks)
    assert len(probes) == len(nonces) == 1
    await storage.clear(probes)


async def test_a_peer_makes_an_agent_write_into_nothing_but_a_probe(tmp_path: Path, image: Path) -> None:
    storage = SharedDirs([tmp_path])
    (tmp_path / f"{PROBE_PREFIX}short").write_bytes(bytes(NONCE_BYTES - 1))
    (tmp_path / f"{PROBE_PREFIX}two-names").write_bytes(bytes(NONCE_BYTES))
    os.link(tmp_path / f"{PROBE_PREFIX}two-names", tmp_path / "another-name")
    (tmp_path / f"{PROBE_PREFIX}link").symlink_to(image)
    os.mkfifo(tmp_path / f"{PROBE_PREFIX}pipe")
    before = contents(tmp_path)
    with anyio.fail_after(5):
        for name in ("short", "two-names", "link", "pipe", "none"):
            probe = Probe(
                disk="d",
                path=f"{tmp_path}/{PROBE_PREFIX}{name}",
                image=str(image),
                offsets=(0,),
                is_locked=True,
            )
            (reading,) = await storage.read_probes([probe])
            assert not reading.echo, name
        (reading,) = await storage.read_probes([Probe(disk="d", path=str(image), image=str(image))])
        assert (reading.content, reading.echo) == (None, b"")
    assert contents(tmp_path) == before


async def test_a_peer_asks_for_no_more_probes_than_a_guest_has_disks(tmp_path: Path, image: Path) -> None:
    probe = Probe(disk="d", path="", image=str(image), offsets=(0,) * 1000)
    readings = await SharedDirs([tmp_path]).read_probes([probe] * (MAX_PROBES + 1))
    assert len(readings) == MAX_PROBES


async def test_a_storage_that_hangs_is_the_finding_of_its_own_disk_alone(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = threading.Event()

    def hang(probe: Probe, places: SharedPlaces) -> Reading:
        if probe.disk == "hanging":
            ends.wait(10)
        return answer(probe, places)

    monkeypatch.setattr(storage_module, "answer", hang)
    probes = [Probe(disk=name, path="", image=str(image)) for name in ("hanging", "well")]
    hanging, good = await SharedDirs([tmp_path], timeout_s=0.2).read_probes(probes)
    ends.set()
    assert good.image is not None
    assert not good.image.error
    assert hanging.image is not None
    assert "did not answer" in hanging.image.error
