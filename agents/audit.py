"""The audit log: who asked for what, and what was decided. One JSON object a line, in a file that only grows.

Law: decides nothing, and knows no key and no guest's memory: what a line has is in AuditLine. `AuditFile` blocks and
belongs in a worker thread. A line is given to the kernel in one write, or taken back: no reader meets half a line that
a full disk has left. Text that came from a peer is cut, and escaped to ASCII.

    PATH            0600, O_APPEND
    PATH.1 ... .8   the files before it, the newest first
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

__all__ = ["AuditFile", "AuditLine", "Outcome", "RefusalFold"]

# Some 40 000 decisions; a page of them is still quick to search.
ROTATE_BYTES: Final = 16 << 20
# With the file in use 144 MiB: more than a year of an agent that is asked for a move every five minutes.
KEPT_FILES: Final = 8
# The longest sentence of ours, with a guest's name in it.
MAX_FIELD_CHARS: Final = 600
# Who is refused again and again must not push everything else out of the files: so many lines a minute for each peer,
# and for all strangers together, then a count. That is 4 MiB a day.
REFUSALS_PER_MINUTE: Final = 10
# Peers whose refusals are counted apart; their names come from certificates of the fleet.
MAX_FOLDED_PEERS: Final = 256
_MINUTE_S: Final = 60.0


class Outcome(StrEnum):
    """What became of a request or a connection."""

    ALLOWED = "allowed"
    DENIED = "denied"
    REFUSED = "refused"
    CUT = "cut"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """One decision. `denied` is by the rules, `refused` before any rule: a certificate that was not accepted.

    A connection that had been accepted and is so no longer is `cut`. `more` counts refusals like this one that have no
    line of their own.
    """

    at_s: float
    outcome: Outcome
    peer: str
    address: str
    action: str
    guest: str = ""
    guest_id: str = ""
    source: str = ""
    to: str = ""
    rule: str = ""
    reason: str = ""
    job: str = ""
    more: int = 0

    def facts(self) -> dict[str, object]:
        """Give it with the names that it has in the file; what there is nothing of is None."""
        fields = {
            "verdict": str(self.outcome),
            "peer": self.peer,
            "address": self.address,
            "action": self.action,
            "guest": self.guest,
            "guest_id": self.guest_id,
            "from": self.source,
            "to": self.to,
            "rule": self.rule,
            "reason": self.reason,
            "job": self.job,
        }
        facts: dict[str, object] = {name: value[:MAX_FIELD_CHARS] or None for name, value in fields.items()}
        return facts | ({"more": self.more} if self.more else {})

    def to_bytes(self) -> bytes:
        """Give the line, with its end."""
        moment = datetime.fromtimestamp(self.at_s, UTC)
        at = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"
        return json.dumps({"time": at, **self.facts()}).replace("\x7f", "\\u007f").encode("ascii") + b"\n"


class AuditFile:
    """The file, and those before it. Only one thread at a time may use it."""

    def __init__(self, path: Path, *, rotate_bytes: int = ROTATE_BYTES, kept_files: int = KEPT_FILES) -> None:
        """Nothing is opened before the first line."""
        self.path: Final = path
        self._rotate_bytes = rotate_bytes
        self._kept_files = kept_files
        self._descriptor: int | None = None

    def append(self, line: bytes) -> None:
        """Write one line.

        Raises:
            OSError: the world's: it is not in the file, and neither is a part of it.
        """
        descriptor = self._current()
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes and size_bytes + len(line) > self._rotate_bytes:
            # A file that cannot be moved away (it may be append-only) goes on growing: that loses nothing.
            with contextlib.suppress(OSError):
                self._rotate()
            descriptor = self._current()
            size_bytes = os.fstat(descriptor).st_size
        written_bytes = os.write(descriptor, line)
        if written_bytes < len(line):
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Make durable what was written. Raises OSError."""
        if self._descriptor is not None:
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Let go of the file. May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _current(self) -> int:
        """Give the descriptor of what has the path's name now: a program that rotates logs may have moved ours."""
        if self._descriptor is not None and not self._is_in_place(self._descriptor):
            self.close()
        if self._descriptor is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = _whole(os.open(self.path, flags, 0o600))
        return self._descriptor

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False

    def _rotate(self) -> None:
        for number in range(self._kept_files, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                self._kept(number - 1).rename(self._kept(number))
        self.path.rename(self._kept(1))

    def _kept(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


class RefusalFold:
    """Which refusals get a line of their own, and how many did not."""

    def __init__(self) -> None:
        # Per peer: when its minute began, and how many refusals there were in it.
        self._minutes: dict[str, tuple[float, int]] = {}

    def admits(self, peer: str, now_s: float) -> bool:
        """Count a refusal; tell whether it gets a line. Ask `left_out` first, which ends minutes that are over."""
        if peer not in self._minutes and len(self._minutes) >= MAX_FOLDED_PEERS:
            peer = ""
        began_s, count = self._minutes.get(peer, (now_s, 0))
        self._minutes[peer] = (began_s, count + 1)
        return count < REFUSALS_PER_MINUTE

    def left_out(self, now_s: float) -> list[tuple[str, int]]:
        """Give the peers whose minute is over and who had refusals without a line, with how many."""
        over = {
            peer: count for peer, (began_s, count) in self._minutes.items() if now_s - began_s >= _MINUTE_S
        }
        for peer in over:
            del self._minutes[peer]
        return [
            (peer, count - REFUSALS_PER_MINUTE) for peer, count in over.items() if count > REFUSALS_PER_MINUTE
        ]


def _whole(descriptor: int) -> int:
    """Make an open file fit to be appended to: ours alone, regular, and with a whole last line."""
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        if stat.S_IMODE(facts.st_mode) & 0o077:
            os.fchmod(descriptor, 0o600)
        # A machine that lost its power may have left half a line: it must not swallow the next one.
        if facts.st_size and os.pread(descriptor, 1, facts.st_size - 1) != b"\n":
            os.write(descriptor, b"\n")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
