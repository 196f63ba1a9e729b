"""Predictions beside their outcomes, on disk: what an agent learns from, and shows.

Law: judges nothing (`migrate.lessons` does). Files are `agents.audit.AuditFile`s: a line is appended in one write, and
a file that has grown is moved away. JSON lines and not a database: one process writes, a line that was lost costs one
lesson and no move, a person reads them with `tail` and `jq`, and nothing is ever changed, only added. Reading trusts
nothing: what is no line of ours, too long, or older than the newest MAX_KEPT is left out. Blocks: use worker threads.

    STATE_DIR/predictions.jsonl      ["prediction", {...}] or ["move-outcome", {...}], a line each, 0600
    STATE_DIR/predictions.jsonl.1    the file before it
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgpack

from agents.audit import AuditFile
from agents.logs import get_logger, log_event
from migrate.forecast import MoveOutcome, PastMove, Prediction
from transport.errors import BadMessage, FrameTooLarge
from transport.schema import Schema

__all__ = ["MAX_KEPT", "MAX_OPEN", "PredictionFile", "PredictionTable"]

_log = get_logger(__name__)

# Some 1 500 moves: more than anything learns from. With the file before it twice as much.
ROTATE_BYTES: Final = 4 << 20
KEPT_FILES: Final = 1
# A prediction is 3 KiB; one of a guest with the longest names 4.
MAX_LINE_BYTES: Final = 16 << 10
# What is held in memory, some 10 KiB each; lessons are drawn from the newest 60 moves.
MAX_KEPT: Final = 300
# Of checks that no move has followed, and of moves under way: whoever checks each minute must not push out the lessons.
MAX_OPEN: Final = 100
_SCHEMA: Final = Schema(Prediction, MoveOutcome)


class PredictionTable:
    """Predictions by their identities, the oldest first, each with its outcome once there is one."""

    def __init__(self) -> None:
        self._predictions: dict[str, Prediction] = {}
        self._outcomes: dict[str, MoveOutcome] = {}

    def add(self, value: Prediction | MoveOutcome) -> None:
        """Keep one more; the oldest are forgotten. An outcome without its prediction teaches nothing."""
        if isinstance(value, MoveOutcome):
            if value.prediction_id in self._predictions:
                self._outcomes[value.prediction_id] = value
            return
        self._predictions[value.prediction_id] = value
        for is_open, most in ((True, MAX_OPEN), (False, MAX_KEPT)):
            alike = [one for one in self._predictions if (one not in self._outcomes) is is_open]
            for oldest in alike[: max(len(alike) - most, 0)]:
                del self._predictions[oldest]
                self._outcomes.pop(oldest, None)

    def moves(self) -> list[PastMove]:
        """Give everything, oldest first."""
        return [
            PastMove(prediction=one, outcome=self._outcomes.get(one.prediction_id))
            for one in self._predictions.values()
        ]


class PredictionFile:
    """The file of one agent. Only one thread at a time may use it."""

    def __init__(self, path: Path, *, rotate_bytes: int = ROTATE_BYTES) -> None:
        """Nothing is opened before it is used."""
        self.path: Final = path
        self._file: Final = AuditFile(path, rotate_bytes=rotate_bytes, kept_files=KEPT_FILES)
        self._most_bytes: Final = rotate_bytes + MAX_LINE_BYTES

    def append(self, value: Prediction | MoveOutcome) -> None:
        """Write one line.

        Raises:
            OSError: the world's: it is not in the file.
        """
        line = (
            json.dumps(msgpack.unpackb(_SCHEMA.encode(value)), separators=(",", ":")).encode("ascii") + b"\n"
        )
        if len(line) > MAX_LINE_BYTES:
            log_event(
                _log, logging.WARNING, "prediction not kept", because="its line is too long", bytes=len(line)
            )
            return
        self._file.append(line)

    def read(self) -> PredictionTable:
        """Give everything that can be read, of both files; what cannot is counted in the log."""
        table = PredictionTable()
        for path in (self.path.with_name(f"{self.path.name}.1"), self.path):
            bad = 0
            for line in self._lines(path):
                value = _value_of(line)
                if value is None:
                    bad += 1
                else:
                    table.add(value)
            if bad:
                log_event(
                    _log,
                    logging.WARNING,
                    "predictions left out",
                    file=str(path),
                    lines=bad,
                    because="unreadable",
                )
        return table

    def close(self) -> None:
        """Let go of the file. May be called twice."""
        self._file.close()

    def _lines(self, path: Path) -> Iterator[bytes]:
        """Give the lines of a file, at most as many bytes as it may grow to, the newest."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as exc:
            log_event(_log, logging.WARNING, "predictions not read", file=str(path), because=str(exc))
            return
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                log_event(
                    _log, logging.WARNING, "predictions not read", file=str(path), because="no regular file"
                )
                return
            if facts.st_size > self._most_bytes:
                file.seek(facts.st_size - self._most_bytes)
                file.readline(self._most_bytes)
            try:
                data = file.read(self._most_bytes)
            except OSError as exc:
                log_event(_log, logging.WARNING, "predictions not read", file=str(path), because=str(exc))
                return
        yield from (line for line in data.split(b"\n") if line)


def _value_of(line: bytes) -> Prediction | MoveOutcome | None:
    """Read one line; None: it is none of ours, or of a release that wrote them otherwise."""
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        value = _SCHEMA.decode(msgpack.packb(json.loads(line)))
    except (ValueError, RecursionError, OverflowError, TypeError, BadMessage, FrameTooLarge):
        return None
    return value if isinstance(value, Prediction | MoveOutcome) else None
