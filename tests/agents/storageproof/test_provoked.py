"""Disks that differ between two ends in every way that this machine can make real, and what the preflight says."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from agents.storage import SharedDirs
from agents.storageproof import locks
from migrate.facts import DiskFacts
from migrate.ownership import Ownership
from migrate.preflight import Finding, Severity, examine
from tests.agents.storageproof.other_end import Ends
from tests.loopdevices import loop_of
from tests.migrate.test_preflight import GOOD
from tests.needs import skipped_where_not_here
from tests.waiting import looks

# Each starts a Python for the other end.
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
]

AREA = frozenset(
    {
        *(
            "storage",
            "disk-content",
            "ownership",
            "disk-lock",
            "disk-in-use",
            "disk-cache",
            "disk-filesystem",
        ),
        *("disk-access", "disk-format", "backing-chain", "disk-space", "disk-pool"),
    }
)
NOBODY = 65534
MIB = 1 << 20


def needs_mounts() -> pytest.MarkDecorator:
    """For tests that make mounts in a namespace of their own."""
    can = (
        os.geteuid() == 0
        and subprocess.run(
            ["unshare", "-m", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/mnt"],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
    return pytest.mark.skipif(not can, reason="needs root, and a container that lets it mount a file system")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A shared directory that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="vmferry-storage-"))
    try:
        folder.chmod(0o777)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def image(shared: Path) -> DiskFacts:
    """A raw disk of noise."""
    path = shared / "guest.raw"
    path.write_bytes(os.urandom(MIB))
    path.chmod(0o666)
    return disk(path)


def disk(path: Path, **changed: object) -> DiskFacts:
    facts = DiskFacts(
        name="disk0", path=str(path), size_bytes=MIB, is_read_only=False, format="raw", cache="none"
    )
    return replace(facts, **changed)  # type: ignore[arg-type]


def qcow2(path: Path, *arguments: str) -> DiskFacts:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments, path, "1M"], check=True)
    return disk(path, format="qcow2")


def overwrite(facts: DiskFacts) -> None:
    with Path(facts.path).open("r+b") as file:
        file.write(os.urandom(MIB))


def fill(path: Path) -> None:
    """Write to a file until its file system is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


@contextlib.contextmanager
def written_by_a_hypervisor(facts: DiskFacts) -> Iterator[None]:
    """Hold the lock that QEMU holds on an image that it writes."""
    with Path(facts.path).open("r+b") as held:
        locks.hold(held.fileno())
        yield


async def examined(facts: DiskFacts, ends: Ends) -> dict[str, Finding]:
    """Prove one disk between this end and the other; give the worst finding of each check that is not `ok`."""
    here = SharedDirs([ends.shared], shared_devices=ends.devices)
    probes, nonces = await here.plant([facts])
    try:
        before = await here.look(probes)
        readings = await ends.read_at_the_other(probes)
        after = await here.look(probes)
    finally:
        await here.clear(probes)
    report = examine(
        replace(
            GOOD,
            guest=replace(GOOD.guest, disks=(facts,)),
            probes=probes,
            nonces=nonces,
            before=before,
            readings=readings,
            after=after,
        )
    )
    assert {finding.check for finding in report.findings} >= AREA
    found = {
        finding.check: finding
        for severity in (Severity.UNKNOWN, Severity.WARNING, Severity.REFUSED)
        for finding in report.of(severity)
    }
    assert set(found) <= AREA, found
    assert not list(ends.shared.glob(".vmferry-probe-*"))
    return found


def severities(found: dict[str, Finding]) -> dict[str, str]:
    return {check: str(finding.severity) for check, finding in found.items()}


async def test_the_same_file_is_proved(shared: Path, image: DiskFacts) -> None:
    assert await examined(image, Ends(shared=shared)) == {}


async def test_a_disk_that_is_written_all_the_time_is_proved(shared: Path, image: DiskFacts) -> None:
    async def write() -> None:
        async for _ in looks(0.001):
            overwrite(image)

    async with anyio.create_task_group() as writing:
        writing.start_soon(write)
        found = await examined(image, Ends(shared=shared))
        writing.cancel_scope.cancel()
    assert severities(found) in ({}, {"disk-content": "unknown"})


@needs_mounts()
async def test_a_directory_of_the_same_name_is_refused(shared: Path, image: DiskFacts) -> None:
    mounts = f"cp {shared}/guest.raw /tmp/.c$$; mount -t tmpfs none {shared}; mv /tmp/.c$$ {shared}/guest.raw"
    found = await examined(image, Ends(shared=shared, mounts=mounts))
    assert severities(found)["storage"] == "refused"
    assert "No such file" in found["storage"].found
    # An identical copy: nothing but the nonce tells.
    assert "disk-content" not in found


@needs_mounts()
async def test_a_file_that_is_mounted_over_the_disk_is_refused_though_its_directory_is_the_same(
    shared: Path, image: DiskFacts
) -> None:
    copy = shared / "copy.raw"
    shutil.copy(image.path, copy)
    over = Ends(shared=shared, mounts=f"mount --bind {copy} {image.path}")
    found = await examined(image, over)
    assert severities(found) == {"storage": "refused"}
    assert "mounted over it" in found["storage"].found
    copy.write_bytes(os.urandom(MIB))
    found = await examined(image, over)
    assert severities(found) == {"storage": "refused", "disk-content": "refused"}


@needs_mounts()
async def test_a_link_to_a_copy_in_the_same_directory_is_refused(shared: Path, image: DiskFacts) -> None:
    """Each end resolves the link for itself: here it is a link in a directory that is not shared."""
    copy, link = shared / "copy.raw", shared / "links" / "guest.raw"
    shutil.copy(image.path, copy)
    link.parent.mkdir()
    link.symlink_to(image.path)
    mounts = f"mount -t tmpfs none {link.parent}; ln -s {copy} {link}"
    found = await examined(disk(link), Ends(shared=shared, mounts=mounts))
    assert severities(found) == {"storage": "refused"}
    assert "it leads to guest.raw" in found["storage"].found
    assert "copy.raw" in found["storage"].found


@needs_mounts()
async def test_a_disk_that_leads_out_of_the_shared_directories_is_refused(
    shared: Path, image: DiskFacts
) -> None:
    link = shared / "links" / "guest.raw"
    link.parent.mkdir()
    link.symlink_to(image.path)
    mounts = f"mount -t tmpfs none {link.parent}; ln -s /etc/passwd {link}"
    found = await examined(disk(link), Ends(shared=shared, mounts=mounts))
    assert severities(found) == {
        "storage": "refused",
        "disk-content": "refused",
        "disk-access": "refused",
        "disk-format": "unknown",
        "disk-filesystem": "unknown",
        "disk-lock": "warning",
    }
    assert "shared_dirs" in found["disk-access"].found


@needs_mounts()
async def test_a_storage_that_is_read_only_there_is_refused(shared: Path, image: DiskFacts) -> None:
    mounts = f"mount --bind {shared} {shared}; mount -o remount,ro,bind {shared}"
    found = await examined(image, Ends(shared=shared, mounts=mounts))
    assert severities(found) == {"storage": "refused", "disk-access": "refused", "disk-lock": "warning"}
    assert "read-only" in found["disk-access"].found


@needs_mounts()
async def test_an_image_that_is_missing_there_is_refused(shared: Path, image: DiskFacts) -> None:
    folder = shared / "sub"
    folder.mkdir()
    shutil.copy(image.path, folder / "guest.raw")
    found = await examined(
        disk(folder / "guest.raw"), Ends(shared=shared, mounts=f"mount -t tmpfs none {folder}")
    )
    assert {check for check, one in found.items() if one.severity is Severity.REFUSED} == {
        "storage",
        "disk-content",
        "disk-access",
    }
    assert "No such file" in found["disk-access"].found


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else at the other end")
async def test_an_image_that_the_other_user_cannot_write_is_refused(shared: Path, image: DiskFacts) -> None:
    os.chmod(image.path, 0o644)
    found = await examined(image, Ends(shared=shared, user=NOBODY))
    assert severities(found)["disk-access"] == "refused"
    assert "Permission denied" in found["disk-access"].found


async def test_a_backing_file_that_is_missing_or_elsewhere_or_another_is_refused(shared: Path) -> None:
    base, top = shared / "base.qcow2", shared / "top.qcow2"
    qcow2(base)
    facts = qcow2(top, "-b", "base.qcow2", "-F", "qcow2")
    assert await examined(facts, Ends(shared=shared)) == {}
    base.rename(shared / "gone.qcow2")
    found = await examined(facts, Ends(shared=shared))
    assert severities(found) == {"backing-chain": "refused"}
    assert "base.qcow2: No such file" in found["backing-chain"].found
    base.symlink_to("/etc/passwd")
    found = await examined(facts, Ends(shared=shared))
    assert "shared_dirs" in found["backing-chain"].found


@needs_mounts()
async def test_another_backing_file_there_is_refused(shared: Path) -> None:
    base = shared / "base.raw"
    base.write_bytes(os.urandom(MIB))
    facts = qcow2(shared / "top.qcow2", "-b", "base.raw", "-F", "raw")
    (shared / "other.raw").write_bytes(os.urandom(MIB))
    found = await examined(facts, Ends(shared=shared, mounts=f"mount --bind {shared}/other.raw {base}"))
    assert severities(found) == {"backing-chain": "refused"}
    assert "differs" in found["backing-chain"].found


async def test_an_image_of_another_format_than_declared_is_said(shared: Path, image: DiskFacts) -> None:
    found = await examined(replace(image, format="qcow2"), Ends(shared=shared))
    assert severities(found) == {"disk-format": "refused"}
    found = await examined(replace(qcow2(shared / "b.qcow2"), format="raw"), Ends(shared=shared))
    assert severities(found) == {"disk-format": "warning"}


async def test_a_cached_disk_is_refused(shared: Path, image: DiskFacts) -> None:
    found = await examined(replace(image, cache="writeback"), Ends(shared=shared))
    assert severities(found) == {"disk-cache": "refused"}


async def test_an_image_that_another_process_there_writes_is_refused(shared: Path, image: DiskFacts) -> None:
    with written_by_a_hypervisor(image):
        found = await examined(image, Ends(shared=shared))
        assert severities(found) == {"disk-in-use": "refused"}
        # The guest's own lock is no reason, where both ends are on one machine.
        assert await examined(replace(image, is_locked=True), Ends(shared=shared)) == {}


@needs_mounts()
async def test_a_full_file_system_and_one_that_thin_images_outgrow(shared: Path) -> None:
    await anyio.run_process(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(shared)])
    try:
        thin = shared / "thin.raw"
        thin.touch()
        os.truncate(thin, 64 * MIB)
        found = await examined(disk(thin), Ends(shared=shared))
        assert severities(found) == {"disk-space": "warning"}
        fill(shared / "filler")
        found = await examined(disk(thin), Ends(shared=shared))
        assert severities(found) == {"storage": "refused", "disk-lock": "warning", "disk-space": "warning"}
        assert "No space left" in found["storage"].found
    finally:
        await anyio.run_process(["umount", "-l", str(shared)])


# ---------------------------------------------------------------------- block devices


@pytest.fixture
def loops(shared: Path) -> Iterator[list[str]]:
    """Two loop devices of different content."""
    with ExitStack() as ends:
        ends.enter_context(skipped_where_not_here())
        made = []
        for number in range(2):
            path = shared / f"loop{number}.raw"
            path.write_bytes(os.urandom(MIB))
            made.append(ends.enter_context(loop_of(path)))
        yield made


async def test_a_block_device_is_proved_without_a_nonce(shared: Path, loops: list[str]) -> None:
    facts = disk(Path(loops[0]))
    assert await examined(facts, Ends(shared=shared, devices=("/dev/loop*",))) == {}
    found = await examined(
        facts, Ends(shared=shared, devices=("/dev/loop*",), other_devices=("/dev/mapper/*",))
    )
    assert severities(found)["disk-access"] == "refused"
    assert "shared_devices" in found["disk-access"].found


@needs_mounts()
async def test_another_block_device_of_the_same_name_is_refused(shared: Path, loops: list[str]) -> None:
    ends = Ends(shared=shared, devices=("/dev/loop*",), mounts=f"mount --bind {loops[1]} {loops[0]}")
    found = await examined(disk(Path(loops[0])), ends)
    assert severities(found) == {"storage": "refused", "disk-content": "refused"}
    assert "of one kernel" in found["storage"].found


async def test_a_guest_on_a_block_device_has_its_record_in_the_first_shared_directory(
    shared: Path, loops: list[str]
) -> None:
    guest = replace(GOOD.guest, disks=(disk(Path(loops[0])),))
    storage = SharedDirs([shared], shared_devices=("/dev/loop*",))
    directory = await storage.ownership_dir(guest)
    assert directory == str(shared / ".vmferry")
    assert await storage.check_ownership_dir(directory, guest) is None
    wanted = Ownership(guest_id=guest.guest_id, generation=1, owner="host-a", migration_id="m")
    assert await storage.claim(directory, wanted) == wanted
    other = SharedDirs([shared.parent, shared])
    assert "first in [storage] shared_dirs" in (await other.check_ownership_dir(directory, guest) or "")


# ---------------------------------------------------------------------- file systems in user space


@needs_mounts()
@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="this machine has no FUSE")
@pytest.mark.skipif(shutil.which("bindfs") is None, reason="needs bindfs")
async def test_a_file_system_without_locks_between_hosts_is_warned_of(shared: Path, image: DiskFacts) -> None:
    behind = Path(tempfile.mkdtemp(prefix="vmferry-behind-"))
    shutil.move(image.path, behind)
    command = f"bindfs {behind} {shared}"
    await anyio.run_process(command.split())
    try:
        found = await examined(image, Ends(shared=shared, mounts=f"umount -l {shared}; {command}"))
        assert severities(found) == {"disk-lock": "warning"}
        assert "was given the lock" in found["disk-lock"].found
    finally:
        await anyio.run_process(["umount", str(shared)])
        shutil.rmtree(behind)
