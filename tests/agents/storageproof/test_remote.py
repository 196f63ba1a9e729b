"""Network disks as both ends see them: a real NBD server, asked with QEMU's own tools."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from agents.hypervisors.processes import has_ended
from agents.storage import SharedDirs
from agents.storageproof import tools
from agents.storageproof.images import look_at
from agents.storageproof.places import SharedPlaces
from migrate.facts import DiskFacts, DiskKind, ImageFacts
from tests.agents.diskservers import (
    gluster_file,
    http_file,
    iscsi_lun,
    nbd_export,
    nfs_file,
    rbd_image,
)
from tests.agents.hypervisors.qemu.conftest import needs_qemu
from tests.needs import skipped_where_not_here

pytestmark = [pytest.mark.anyio, pytest.mark.slow, needs_qemu()]

PATTERNS = ("nbd://127.0.0.1:*/guest-*",)
SECTOR = 4096
Server = Callable[..., AbstractContextManager[str]]
SERVERS: dict[str, Server] = {
    "nbd": nbd_export,
    "iscsi": iscsi_lun,
    "http": http_file,
    "nfs": nfs_file,
    "gluster": gluster_file,
    "rbd": rbd_image,
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "guest.raw"
    path.write_bytes(os.urandom(16 * SECTOR + 512))
    return path


def seen(
    url: str, *offsets: int, patterns: tuple[str, ...] = PATTERNS, read_only: bool = False
) -> ImageFacts:
    return look_at(url, SharedPlaces.of((), (), patterns), offsets=offsets, is_read_only=read_only)


@pytest.mark.parametrize("scheme", SERVERS)
def test_what_a_server_has_is_seen_as_the_file_behind_it(image: Path, scheme: str) -> None:
    offsets = (0, 5 * SECTOR, 16 * SECTOR)
    with skipped_where_not_here(), SERVERS[scheme](image) as url:
        far = seen(url, *offsets, patterns=(url,), read_only=scheme == "http")
    near = look_at(str(image), SharedPlaces.of((image.parent,)), offsets=offsets)
    assert (far.error, far.write_error, far.chain_error) == ("", "", "")
    assert far.size_bytes == near.size_bytes
    assert far.digests == near.digests
    assert far.identity == url
    assert far.format == "raw"


@pytest.mark.parametrize("scheme", SERVERS)
def test_a_server_without_it_and_a_server_that_has_ended_are_said(image: Path, scheme: str) -> None:
    missing = {
        "nbd": "not available",
        "iscsi": "LOGICAL_UNIT_NOT_SUPPORTED",
        "http": "404",
        "nfs": "NOENT",
        "gluster": "is there a file guest.ra9 in its volume guests",
        "rbd": "No such file",
    }
    with skipped_where_not_here(), SERVERS[scheme](image) as url:
        other = url[:-1] + "9"
        assert missing[scheme] in seen(other, patterns=(other,), read_only=True).error
    error = seen(url, patterns=(url,), read_only=True).error
    assert re.search("cannot be reached|gave no answer|failed to connect|mount", error), error


@pytest.mark.parametrize(
    ("serving", "words"),
    [
        (lambda image: nbd_export(image, "-r"), "Permission denied"),
        (http_file, "does not support writes"),
    ],
)
def test_what_can_only_be_read_says_so(image: Path, serving: Server, words: str) -> None:
    with skipped_where_not_here(), serving(image) as url:
        assert words in seen(url, patterns=(url,)).write_error
        assert seen(url, patterns=(url,), read_only=True).write_error == ""


def test_what_the_library_is_slow_to_close_is_asked_in_no_time(image: Path) -> None:
    """A qemu-img that opens it takes ten seconds to end, and says nothing until then."""
    with skipped_where_not_here(), gluster_file(image) as url:
        began = time.monotonic()
        assert seen(url, 0, patterns=(url,)).error == ""
        assert time.monotonic() - began < tools.ANSWERS_WITHIN_S
        other = url.replace("/guests/", "/others/")
        assert "volume others, path guest.raw failed" in seen(other, patterns=(other,)).error


def test_a_server_of_this_host_ends_with_whoever_asked_it(image: Path) -> None:
    script = (
        "import sys\nfrom agents.storageproof import tools\n"
        "with tools.serving('--read-only', '-f', 'raw', sys.argv[1], silent='') as server:\n"
        "    print(server._process.pid, flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(image.parent)},
    ) as asker:
        assert asker.stdout is not None
        server = os.pidfd_open(int(asker.stdout.readline()))
        try:
            asker.kill()
            assert has_ended(server, 5.0)
        finally:
            os.close(server)


def test_a_host_without_the_key_of_its_user_says_so(image: Path) -> None:
    with skipped_where_not_here(), rbd_image(image) as url:
        other = url.replace("vm@", "vm2@")
        assert "is the key of client.vm2 where Ceph looks for it here" in seen(other, patterns=(other,)).error


def test_an_image_with_another_under_it_is_not_whole(image: Path) -> None:
    top = image.with_name("top.qcow2")
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-b", image.name, "-F", "raw", top, "1M"], check=True
    )
    with skipped_where_not_here(), nbd_export(top) as url:
        found = seen(url)
    assert (found.format, found.virtual_bytes) == ("qcow2", 1 << 20)
    assert found.chain_error == "what lies under a network disk is not looked at"


@pytest.mark.parametrize(
    ("patterns", "words"),
    [((), "none of this host's network disks"), (("nbd://127.0.0.1:*/other-*",), "none of this host's")],
)
def test_only_what_the_configuration_allows_is_asked(
    image: Path, patterns: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert words in seen("nbd://127.0.0.1:1/guest-1", patterns=patterns).error


def test_a_server_that_is_not_there_or_has_no_such_export_is_said(image: Path) -> None:
    assert "Connection refused" in seen("nbd://127.0.0.1:1/guest-1").error
    with skipped_where_not_here(), nbd_export(image) as url:
        assert "not available" in seen(url.replace("guest-1", "guest-2")).error
    assert "has no address here" in seen("nbd://no.invalid:1/a", patterns=("nbd://no.invalid:1/a",)).error


def test_a_server_that_takes_one_client_only_is_noticed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "ANSWERS_WITHIN_S", 0.5)
    with skipped_where_not_here(), nbd_export(image, clients=1) as url:
        holder = subprocess.Popen(
            ["qemu-io", "-r", "-U", "-f", "raw", url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert holder.stdout is not None
            holder.stdout.read(len("qemu-io> "))
            assert "several clients at once" in seen(url).error
        finally:
            holder.kill()
            holder.communicate()


@pytest.mark.parametrize(
    ("url", "tool"),
    [("nbd://127.0.0.1:1/guest-1", "qemu-img"), ("gluster://127.0.0.1:1/guests/guest-1", "qemu-nbd")],
)
def test_a_host_without_the_tools_says_which(monkeypatch: pytest.MonkeyPatch, url: str, tool: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which(tool) is None
    assert f"{tool} is not installed here (Debian: qemu-utils" in seen(url, patterns=(url,)).error


@pytest.mark.parametrize("script", ["exec sleep 60", "exit 1", "echo 'qemu-nbd: no such thing' >&2; exit 1"])
def test_a_server_of_this_host_that_does_not_start_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(tools, "ANSWERS_WITHIN_S", 0.3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fake = tmp_path / "qemu-nbd"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"gluster://127.0.0.1:{server.getsockname()[1]}/guests/guest-1"
        error = seen(url, patterns=(url,)).error
    assert re.search("gave no answer|qemu-nbd has failed|no such thing", error), error
    assert list(tmp_path.iterdir()) == [fake]


def test_a_qemu_without_a_driver_for_it_says_where_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What qemu-img prints where qemu-block-extra is missing."""
    script = tmp_path / "qemu-img"
    script.write_text(
        "#!/bin/sh\necho \"qemu-img: Could not open '$6': Unknown protocol 'iscsi'\" >&2; exit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"iscsi://127.0.0.1:{server.getsockname()[1]}/iqn.a/1"
        assert "Debian: qemu-block-extra" in seen(url, patterns=(url,)).error


async def test_both_ends_look_at_the_same_sectors(tmp_path: Path, image: Path) -> None:
    source, destination = (SharedDirs([tmp_path], network_disks=PATTERNS) for _ in range(2))
    with skipped_where_not_here(), nbd_export(image) as url:
        disk = DiskFacts(name="disk0", path=url, size_bytes=0, is_read_only=False, kind=DiskKind.NETWORK)
        probes, nonces = await source.plant([disk])
        assert "disk0" not in nonces
        probes = tuple(probe for probe in probes if probe.image)
        (mine,), (theirs,) = await source.look(probes), await destination.read_probes(probes)
        await source.clear(probes)
    assert mine.image is not None
    assert mine.image == theirs.image
    assert len(mine.image.digests) >= 3
    assert all(mine.image.digests)


def test_the_tools_are_told_the_url_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the user whose key ssh takes, which is no part of where the disk is."""
    script, told = tmp_path / "qemu-img", tmp_path / "told"
    script.write_text(f'#!/bin/sh\necho "$@" > {told}; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    url = "ssh://vm@127.0.0.1:1/srv/a.raw"
    assert "cannot be reached" in seen(url, patterns=(url,)).error
    assert told.read_text().split()[-3:] == ["-f", "raw", url]
