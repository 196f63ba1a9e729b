"""Places, locks, mounts, devices and sectors, each by itself."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agents.storageproof import devices, locks, mounts, sectors
from agents.storageproof.images import kernel, look_at
from agents.storageproof.places import SharedPlaces
from agents.storageproof.sectors import MAX_OFFSETS, SECTOR_BYTES, choose_offsets


def a_block_device() -> str:
    """A block device of this machine."""
    for path in sorted(Path("/dev").iterdir()):
        try:
            if stat.S_ISBLK(path.stat().st_mode):
                return str(path)
        except OSError:
            continue
    pytest.skip("this machine shows no block device")


# ---------------------------------------------------------------------- places


def test_a_disk_is_below_a_shared_directory_links_resolved(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "a.raw").touch()
    (shared / "out.raw").symlink_to("/etc/passwd")
    (tmp_path / "in.raw").symlink_to(shared / "a.raw")
    places = SharedPlaces.of([shared])
    assert places.locate(f"{shared}/a.raw") == shared / "a.raw"
    assert places.locate(f"{tmp_path}/in.raw") == shared / "a.raw"
    for hostile in (
        f"{shared}/out.raw",
        f"{shared}/../secret",
        "/etc/passwd",
        "a.raw",
        "",
        f"{shared}/a\0",
        f"{shared}/gone",
    ):
        with pytest.raises(OSError) as refused:
            places.locate(hostile)
        assert refused.value.strerror


def test_a_device_is_allowed_by_the_name_it_was_called_by_and_by_no_way_around(tmp_path: Path) -> None:
    device = a_block_device()
    name = Path(device).name
    for pattern, is_allowed in (
        (device, True),
        ("/dev/*", True),
        ("/dev/*/*", False),
        ("/dev/mapper/*", False),
    ):
        assert SharedPlaces.of([tmp_path], (pattern,)).is_device(device) is is_allowed, pattern
    places = SharedPlaces.of([tmp_path], ("/dev/*", "/dev/*/*"))
    (tmp_path / "link").symlink_to(device)
    for way in (f"/dev/../dev/{name}", f"/dev//{name}", f"{tmp_path}/link", "/dev/null", "/dev", "\0"):
        assert not places.is_device(way), way


# ---------------------------------------------------------------------- locks


def test_a_lock_is_refused_to_others_while_it_is_held_and_seen_in_the_kernels_table(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.touch()
    with path.open("r+b") as mine, path.open("r+b") as other:
        assert locks.is_refused(other.fileno()) is False
        locks.hold(mine.fileno())
        assert locks.is_refused(other.fileno()) is True
        assert locks.writers_of(path.stat()) == 1
    assert locks.writers_of(path.stat()) == 0


def test_nonsense_in_the_kernels_table_is_no_lock(tmp_path: Path) -> None:
    facts = tmp_path.stat()
    where = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    table = tmp_path / "locks"
    table.write_text(
        f"1: OFDLCK ADVISORY  READ  -1 {where} 101 101\n1: -> OFDLCK ADVISORY  READ  -1 {where} 101 101\n"
        f"2: POSIX  ADVISORY  WRITE 7 {where} 0 EOF\n3: FLOCK  ADVISORY  WRITE 7 {where} 0 EOF\n"
        f"4: OFDLCK ADVISORY  READ  -1 {where} 100 100\n5:\n\xff\n6: OFDLCK ADVISORY READ -1 {where} x y\n"
    )
    assert locks.writers_of(facts, table) == 2
    assert locks.writers_of(facts, tmp_path / "none") == 0


# ---------------------------------------------------------------------- mounts and devices


def test_the_file_system_of_an_open_file_is_named() -> None:
    with open("/proc/self/status", "rb") as file:
        assert mounts.file_system_of(mounts.mount_of(file.fileno())) == "proc"
    assert mounts.file_system_of(-1) == ""
    assert mounts.parse_mountinfo("1 2 0:3 / / rw - nfs4 h:/x rw\nnonsense\n2 - \n - x\n") == {1: "nfs4"}


def test_a_device_is_told_by_the_first_thing_that_it_says_of_itself(tmp_path: Path) -> None:
    folder = tmp_path / "8:0"
    (folder / "device").mkdir(parents=True)
    assert devices.identity_of("8:0", tmp_path) == ""
    (folder / "serial").write_text(" abc  1\n")
    assert devices.identity_of("8:0", tmp_path) == "serial:abc 1"
    (folder / "device" / "wwid").write_text("naa.5000\n")
    assert devices.identity_of("8:0", tmp_path) == "wwid:naa.5000"
    part = folder / "sda1"
    part.mkdir()
    (part / "partition").write_text("1\n")
    (part / "start").write_text("2048\n")
    (tmp_path / "8:1").symlink_to(part)
    assert devices.identity_of("8:1", tmp_path) == "wwid:naa.5000+2048"
    assert devices.is_read_only("8:0", tmp_path) is False
    (folder / "ro").write_text("1\n")
    assert devices.is_read_only("8:0", tmp_path) is True


# ---------------------------------------------------------------------- sectors and images


def test_the_first_the_middle_and_the_last_sector_are_among_those_that_are_compared() -> None:
    assert choose_offsets(0) == ()
    assert choose_offsets(1) == (0,)
    chosen = choose_offsets(100 * SECTOR_BYTES + 1)
    assert {0, 50 * SECTOR_BYTES, 100 * SECTOR_BYTES} <= set(chosen)
    assert len(chosen) <= MAX_OFFSETS


def test_a_tail_is_compared_and_what_is_no_sector_of_the_image_is_not(tmp_path: Path) -> None:
    for name, tail in (("a", b"x"), ("b", b"y")):
        (tmp_path / name).write_bytes(bytes(SECTOR_BYTES) + tail)
    found = []
    for name in "ab":
        descriptor, _ = sectors.open_image(tmp_path / name)
        asked = (0, SECTOR_BYTES, 2 * SECTOR_BYTES, -SECTOR_BYTES, 1, 1 << 63, 0, 0, 0)
        found.append(sectors.digests_at(descriptor, asked))
        os.close(descriptor)
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
    assert found[0][2:6] == (b"",) * 4
    assert len(found[0]) == MAX_OFFSETS


def test_what_is_no_image_is_said_and_not_waited_for(tmp_path: Path) -> None:
    places = SharedPlaces.of([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    for path in (f"{tmp_path}/pipe", str(tmp_path), f"{tmp_path}/{'x' * 300}", "\0", ""):
        assert look_at(path, places).error, path
    assert kernel() == look_at("", places).kernel
