"""The directory where the QEMU guests of a host are found: NAME.qmp, and beside it what a guest of ours also has.

Law: the socket `*.qmp` is what makes a guest findable; whoever listens there says who it is. `GUEST_ID.incoming`
marks a machine that waits for its state: it is nobody's guest yet.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agents.hypervisors.qemu.errors import QemuGone

__all__ = ["QemuPaths", "monitors", "prepare_dir"]

# The size of sun_path in a unix socket's address, with the zero at its end.
_MAX_SOCKET_PATH_BYTES: Final = 107
# More guests than a host's memory can hold; a directory with more files than that is not ours.
_MAX_GUESTS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuPaths:
    """The files of one guest. Of a QEMU that somebody else started only `qmp` is there."""

    qmp: Path
    monitor: Path
    console: Path
    log: Path
    pid: Path
    incoming: Path

    @classmethod
    def of_guest(cls, folder: Path, guest_id: str) -> QemuPaths:
        """Give the paths of a guest of ours; `guest_id` is a checked one, and cannot lead out of the directory.

        Raises:
            QemuGone: ours: the directory's name is too long for a socket.
        """
        paths = cls.of_monitor(folder / f"{guest_id}.qmp")
        longest = max(len(os.fsencode(path)) for path in (paths.qmp, paths.monitor, paths.console))
        if longest > _MAX_SOCKET_PATH_BYTES:
            raise QemuGone(
                f"{folder} is too long a path for a socket; choose one of at most "
                f"{_MAX_SOCKET_PATH_BYTES - longest + len(os.fsencode(folder))} bytes"
            )
        return paths

    @classmethod
    def of_monitor(cls, qmp: Path) -> QemuPaths:
        return cls(
            qmp=qmp,
            monitor=qmp.with_suffix(".mon"),
            console=qmp.with_suffix(".con"),
            log=qmp.with_suffix(".log"),
            pid=qmp.with_suffix(".pid"),
            incoming=qmp.with_suffix(".incoming"),
        )

    def remove(self) -> None:
        """Remove what a QEMU that has ended left, except for its log."""
        for path in (self.qmp, self.monitor, self.console, self.pid, self.incoming):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def prepare_dir(folder: Path) -> None:
    """Make the directory, for its owner alone.

    Raises:
        QemuGone: the operator's: others may enter it, or it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as exc:
        raise QemuGone(f"{folder} cannot be made: {exc.strerror}") from exc
    if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise QemuGone(f"{folder} must belong to this user alone: chown it and chmod 700 it")


def monitors(folder: Path) -> Iterator[Path]:
    """Give the QMP sockets in the directory, in order."""
    try:
        found = sorted(entry for entry in folder.iterdir() if entry.suffix == ".qmp")
    except FileNotFoundError:
        return
    yield from found[:_MAX_GUESTS]
