"""The directory where the guests of a host can be found: GUEST_ID.sock, .lock and .log for each.

Law: who holds the lock of a guest is its process, for as long as it lives: that, and not the socket, says whether a
guest of that identity runs here. Whoever gets the lock may remove what a dead guest left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agents.hypervisors.embedded.errors import GuestGone, RequestRefused

__all__ = [
    "GuestPaths",
    "clean_stale",
    "guest_ids",
    "hold_identity",
    "leave",
    "listen",
    "prepare_guests_dir",
    "redirect_output",
]

# The size of sun_path in a unix socket's address, with the zero at its end.
_MAX_SOCKET_PATH_BYTES: Final = 107
# More guests than a host's memory can hold; a directory with more files than that is not ours.
_MAX_GUESTS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPaths:
    """Where one guest's process can be reached and what it writes."""

    socket: Path
    lock: Path
    log: Path

    @classmethod
    def of_socket(cls, socket: Path) -> GuestPaths:
        return cls(socket=socket, lock=socket.with_suffix(".lock"), log=socket.with_suffix(".log"))

    @classmethod
    def of_guest(cls, guests_dir: Path, guest_id: str) -> GuestPaths:
        """Give the paths; `guest_id` is a checked one, and cannot lead out of the directory.

        Raises:
            RequestRefused: ours: the directory's name is too long for a socket.
        """
        socket = guests_dir / f"{guest_id}.sock"
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH_BYTES:
            raise RequestRefused(
                f"{guests_dir} is too long a path for a socket; choose one of at most "
                f"{_MAX_SOCKET_PATH_BYTES - len(socket.name) - 1} bytes"
            )
        return cls.of_socket(socket)


def prepare_guests_dir(guests_dir: Path) -> None:
    """Make the directory, for its owner alone.

    Raises:
        RequestRefused: the operator's: others may enter it, or it cannot be made.
    """
    try:
        guests_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = guests_dir.stat()
    except OSError as exc:
        raise RequestRefused(f"{guests_dir} cannot be made: {exc.strerror}") from exc
    if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise RequestRefused(f"{guests_dir} must belong to this user alone: chown it and chmod 700 it")


def guest_ids(guests_dir: Path) -> Iterator[str]:
    """Give the identities that have a socket here, in order."""
    try:
        names = sorted(entry.stem for entry in guests_dir.iterdir() if entry.suffix == ".sock")
    except FileNotFoundError:
        return
    for name in names[:_MAX_GUESTS]:
        with contextlib.suppress(ValueError):
            if str(uuid.UUID(name)) == name:
                yield name


def hold_identity(paths: GuestPaths) -> int:
    """Take the lock of a guest for this process; give its fd, to be kept open until the process ends.

    Raises:
        RequestRefused: a guest of this identity runs here already.
        GuestGone: the world's: the lock cannot be made.
    """
    fd = _take_lock(paths.lock)
    if fd is None:
        raise RequestRefused(f"a guest of this identity runs on this host already ({paths.socket})")
    return fd


def listen(paths: GuestPaths) -> socket.socket:
    """Listen where agents look for the guest; the caller holds its identity.

    Raises:
        OSError: the world's.
    """
    paths.socket.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(paths.socket))
        paths.socket.chmod(0o600)
        listener.listen(16)
    except OSError:
        listener.close()
        raise
    return listener


def redirect_output(log: Path) -> None:
    """Let this process's output go to the end of `log`, and its input come from nowhere.

    Raises:
        OSError: the world's.
    """
    nowhere = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    for fd, standard in ((nowhere, 0), (output, 1), (output, 2)):
        os.dup2(fd, standard)
    os.close(nowhere)
    os.close(output)


def leave(paths: GuestPaths) -> None:
    """Remove the guest's socket and lock; the caller holds its identity, and its process ends now."""
    paths.socket.unlink(missing_ok=True)
    paths.lock.unlink(missing_ok=True)


def clean_stale(paths: GuestPaths) -> bool:
    """Remove what a dead guest left behind, except for its log; say whether it was dead."""
    fd = _take_lock(paths.lock)
    if fd is None:
        return False
    try:
        leave(paths)
    finally:
        os.close(fd)
    return True


def _take_lock(path: Path) -> int | None:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise GuestGone(f"{path} cannot be made: {exc.strerror}") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        # Whoever held it before us may have removed it: then it locks nothing any more.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        os.close(fd)
