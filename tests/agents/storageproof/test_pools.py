"""Which storage pool has a path: asked of a real libvirtd, and of programs that answer nonsense or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from agents.storageproof import tools
from agents.storageproof.images import look_at
from agents.storageproof.places import SharedPlaces
from agents.storageproof.pools import is_uri, pool_of, volume_of
from tests.agents.diskservers import gluster_file, iscsi_lun, rbd_image
from tests.agents.host.fleet import scratch_folder
from tests.agents.libvirts import (
    LIBVIRTD,
    make_pool,
    make_pool_of_url,
    refresh,
    running_libvirt,
)
from tests.loopdevices import loop_of
from tests.needs import skipped_where_not_here
from tests.preflight.disks import mounted_here
from tests.preflight.pools import need_libvirt

URI = "qemu:///system"
UUID = "fe165a7c-5818-47ac-8f78-852429044ff0"


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have a shell script be the only virsh."""
    (folder / "virsh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "virsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.skipif(
    LIBVIRTD is None or shutil.which("virsh") is None,
    reason="needs libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients",
)
def test_a_real_libvirtd_knows_its_volumes_and_what_is_none() -> None:
    with scratch_folder() as folder:
        target = folder / "pool"
        target.mkdir()
        image = target / "guest.raw"
        image.write_bytes(bytes(1 << 20))
        with running_libvirt(folder) as uri:
            assert pool_of(str(image), uri) == ""
            make_pool(uri, "dir", target)
            assert pool_of(str(image), uri) == "dir"
            late = target / "late.raw"
            late.write_bytes(bytes(1 << 20))
            assert pool_of(str(late), uri) == ""
            refresh(uri, target)
            assert pool_of(str(late), uri) == "dir"
            assert pool_of("--help", uri) == ""
            places = SharedPlaces.of([target], libvirt=uri)
            assert look_at(str(image), places).pool == "dir"
            # Whoever may not look at a path hears nothing of its pool either.
            assert look_at(str(image), SharedPlaces.of([folder / "other"], libvirt=uri)).pool == ""
        seen = look_at(str(image), places)
        assert (seen.error, seen.pool) == ("", "")
        assert "Failed to connect socket" in seen.pool_error


@pytest.mark.slow
@pytest.mark.skipif(
    LIBVIRTD is None or shutil.which("virsh") is None or os.geteuid() != 0,
    reason="needs root, libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients",
)
def test_a_file_system_that_is_a_pool_is_known_by_its_type() -> None:
    with scratch_folder() as folder:
        behind, target = folder / "behind", folder / "pool"
        target.mkdir()
        behind.touch()
        os.truncate(behind, 16 << 20)
        subprocess.run(["mkfs.ext4", "-q", behind], check=True)
        with ExitStack() as ends:
            ends.enter_context(skipped_where_not_here())
            device = ends.enter_context(loop_of(behind))
            ends.enter_context(mounted_here(target, "mount", device))
            image = target / "guest.raw"
            image.write_bytes(bytes(1 << 20))
            uri = ends.enter_context(running_libvirt(folder))
            make_pool(uri, "fs", target, device)
            assert pool_of(str(image), uri) == "fs"
            assert pool_of(str(behind), uri) == ""


@pytest.mark.slow
@pytest.mark.skipif(
    LIBVIRTD is None or shutil.which("virsh") is None or os.geteuid() != 0,
    reason="needs root, libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients",
)
@pytest.mark.parametrize(
    ("serving", "kind"), [(gluster_file, "gluster"), (iscsi_lun, "iscsi-direct"), (rbd_image, "rbd")]
)
def test_a_network_disk_that_is_a_volume_is_known_by_its_url(
    serving: Callable[[Path], AbstractContextManager[str]], kind: str
) -> None:
    with scratch_folder() as folder, skipped_where_not_here():
        need_libvirt(kind)
        image = folder / "guest.raw"
        image.write_bytes(os.urandom(1 << 20))
        with serving(image) as url, running_libvirt(folder) as uri:
            assert pool_of(url, uri) == ""
            assert make_pool_of_url(uri, url, folder) == kind
            seen = look_at(url, SharedPlaces.of((), (), (url,), libvirt=uri))
            assert (seen.error, seen.pool, seen.pool_error) == ("", kind, "")
            assert pool_of(url[:-1] + "9", uri) == ""


@pytest.mark.parametrize(
    ("place", "volume"),
    [
        ("/srv/guests/web1.raw", "/srv/guests/web1.raw"),
        ("gluster://store1:24007/guests/a/web1.raw", "gluster://store1/guests/a/web1.raw"),
        ("gluster://store1:24008/guests/web1.raw", "gluster://store1:24008/guests/web1.raw"),
        ("rbd://vm@mon1:3300/guests/web1", "guests/web1"),
        ("iscsi://[fd00::1]:3260/iqn.a:b/7", "ip-[fd00::1]:3260-iscsi-iqn.a:b-lun-7"),
        ("nbd://store1:10809/web1", ""),
        ("nfs://store1:2049/guests/web1", ""),
        ("--help", ""),
    ],
)
def test_what_libvirt_calls_a_disk(place: str, volume: str) -> None:
    assert volume_of(place) == volume


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 0", "did not say which pool"),
        ("echo nonsense", "did not say which pool"),
        (f"echo {UUID}", "of which type"),
        ("echo 'error: out of order' >&2; exit 1", "out of order"),
        ("exit 1", "no reason given"),
        ("exec sleep 60", "did not answer within"),
        ("head -c 1000000 /dev/zero", "did not say which pool"),
    ],
)
def test_an_answer_that_is_none_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    monkeypatch.setattr(tools, "ANSWERS_WITHIN_S", 0.2)
    answering(tmp_path, monkeypatch, script)
    with pytest.raises(OSError, match=words):
        pool_of("/srv/guests/a.img", URI)


def test_a_host_without_virsh_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"virsh is not installed here \(Debian: libvirt-clients"):
        pool_of("/srv/guests/a.img", URI)


def test_an_address_is_one_argument_and_no_option() -> None:
    for good in (URI, "qemu:///session", "storage:///system", "qemu+unix:///system?socket=/run/libvirt/x"):
        assert is_uri(good), good
    for bad in ("", "--help", "qemu", "qemu:///sys tem", "qemu:///system\n", "QEMU:///system"):
        assert not is_uri(bad), bad
