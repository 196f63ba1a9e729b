from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agents.hypervisors.embedded.errors import RequestRefused
from agents.hypervisors.embedded.rundir import (
    GuestPaths,
    clean_stale,
    guest_ids,
    hold_identity,
    leave,
    listen,
    prepare_guests_dir,
)
from tests.agents.hypervisors.embedded.conftest import GUEST_ID


def test_the_directory_is_for_its_owner_alone(run_dir: Path) -> None:
    prepare_guests_dir(run_dir / "a" / "b")
    assert (run_dir / "a" / "b").stat().st_mode & 0o777 == 0o700
    (run_dir / "a" / "b").chmod(0o750)
    with pytest.raises(RequestRefused, match="chmod 700"):
        prepare_guests_dir(run_dir / "a" / "b")


def test_a_directory_that_cannot_be_made_is_told(run_dir: Path) -> None:
    (run_dir / "file").touch()
    with pytest.raises(RequestRefused, match="cannot be made"):
        prepare_guests_dir(run_dir / "file" / "dir")


def test_a_path_fits_a_socket_or_is_refused() -> None:
    room = 107 - len(f"/{GUEST_ID}.sock")
    assert len(str(GuestPaths.of_guest(Path("/" + "d" * (room - 1)), GUEST_ID).socket)) == 107
    with pytest.raises(RequestRefused, match=f"at most {room} bytes"):
        GuestPaths.of_guest(Path("/" + "d" * room), GUEST_ID)


def test_only_sockets_named_by_an_identity_are_guests(run_dir: Path) -> None:
    for name in (f"{GUEST_ID}.sock", f"{GUEST_ID}.log", "other.sock", f"{GUEST_ID.upper()}.sock"):
        (run_dir / name).touch()
    assert list(guest_ids(run_dir)) == [GUEST_ID]
    assert list(guest_ids(run_dir / "none")) == []


def test_one_identity_is_held_once_and_not_cleaned_while_it_is(run_dir: Path) -> None:
    paths = GuestPaths.of_guest(run_dir, GUEST_ID)
    held = hold_identity(paths)
    listener = listen(paths)
    assert paths.socket.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RequestRefused, match="already"):
        hold_identity(paths)
    assert not clean_stale(paths)
    assert paths.socket.exists()
    listener.close()
    os.close(held)  # what the kernel does when the process dies
    assert clean_stale(paths)
    assert not paths.socket.exists()
    assert not paths.lock.exists()


def test_a_stale_socket_is_in_nobody_s_way(run_dir: Path) -> None:
    paths = GuestPaths.of_guest(run_dir, GUEST_ID)
    listen(paths).close()
    held = hold_identity(paths)
    with listen(paths), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(paths.socket))
    leave(paths)
    os.close(held)
    assert list(run_dir.iterdir()) == []
