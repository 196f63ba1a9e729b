"""Runs in a small machine with an NFS server and two mounts of it: claims, while the server fails at each operation.

The server is Linux's own (nfsd, NFS 4.2), and so is the client; each mount is a client of its own, as two hosts are.
Prints one line `RESULT {...}` for each fault; what must never be is in `wrong`, in words.

Law: `python -m tests.nfs.inside EVERY` in such a machine (`tests.nfs.machine`), and nowhere else.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final
from unittest.mock import patch

import anyio

from agents.ownership import fileops
from agents.ownership.files import OWNERSHIP_DIR, FileRecords
from agents.ownership.threads import StorageThreads
from migrate.ownership import Ownership
from tests.agents.takeover import OUTCOMES, Interrupted, both_ask, mistakes, outcome_of, record, take_over

EXPORT: Final = Path("/srv/export")
# The source's host, and the destination's twice: its calls fail after some tenths of a second, or wait for the server.
SOURCE, SOFT, HARD = Path("/mnt/a"), Path("/mnt/b"), Path("/mnt/c")
# For each call, where agents have 20 s; more than a soft mount's own patience.
TIMEOUT_S: Final = 3.0
RACES: Final = 30


class Fault(StrEnum):
    """What becomes of the server just before an operation."""

    # Ended; calls end with an error.
    DOWN = "down"
    # Ended; calls wait, and are done when it is back.
    HANGS = "hangs"
    # A new one serves the rest, and knows no client and no open file any more.
    RESTARTS = "restarts"
    # A new one serves a copy of the directory, as after a fail-over: old handles are stale.
    REPLACED = "replaced"


class Servant:
    """A shell that was there before any file on NFS was open.

    A new process closes what it inherits, and closing a file that was written waits for the server, which could then
    not be started.
    """

    def __init__(self) -> None:
        script = "while read -r words; do $words && echo done || echo failed; done"
        self._shell = subprocess.Popen(
            ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def do(self, words: str) -> None:
        """Run a command and wait for its end."""
        if self._shell.stdin is None or self._shell.stdout is None:
            raise AssertionError("it has no pipes")
        self._shell.stdin.write(f"{words}\n")
        self._shell.stdin.flush()
        if self._shell.stdout.readline().strip() != "done":
            raise AssertionError(f"{words} failed")


servant = functools.cache(Servant)


def stop_server() -> None:
    servant().do("rpc.nfsd 0")


def start_server() -> None:
    """Serve, without the 90 s in which clients of before may claim what they had."""
    servant().do("rpc.nfsd -N 3 4")
    Path("/proc/fs/nfsd/v4_end_grace").write_text("Y\n")


def restart_server() -> None:
    stop_server()
    start_server()


def fail_over_to_a_copy(folder: Path) -> None:
    """End the server, put a copy in a directory's place, and serve that: what was not on its disk is gone."""
    stop_server()
    copy, old = folder.with_suffix(".copy"), folder.with_suffix(".old")
    shutil.copytree(folder, copy)
    folder.rename(old)
    copy.rename(folder)
    shutil.rmtree(old)
    start_server()


def records_at(mount: Path, timeout_s: float = TIMEOUT_S) -> FileRecords:
    return FileRecords((mount,), StorageThreads(timeout_s))


async def both_claim(folder: str, generation: int, mount: Path) -> dict[str, Ownership]:
    """Have the hosts of both mounts ask for one generation at once, with the patience that agents have."""
    places = {"host-a": SOURCE, "host-b": mount}
    return await both_ask(
        {host: (records_at(at, 20.0), str(at / folder / OWNERSHIP_DIR)) for host, at in places.items()},
        generation,
    )


async def race() -> dict[str, object]:
    """Two hosts claim one generation after the other at the same time."""
    wrong, won = [], {"host-a": 0, "host-b": 0}
    (EXPORT / "race").mkdir()
    for generation in range(1, RACES + 1):
        standing = await both_claim("race", generation, SOFT)
        if standing["host-a"] != standing["host-b"]:
            wrong.append(f"generation {generation}: {standing}")
        won[standing["host-a"].owner] += 1
    return {"fault": "none, two at once", "tried": RACES, "wrong": wrong, **won}


class Trials:
    """One fault at one operation after the other, each with a directory of its own."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.mount = HARD if fault is Fault.HANGS else SOFT
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.errors: set[str] = set()
        self.wrong: list[str] = []

    async def run(self, every: int) -> dict[str, object]:
        operations = len((await self._take(-1)).calls)
        tried = range(0, operations, every)
        for at in tried:
            await self._take(at)
        return {
            "fault": self.fault,
            "operations": operations,
            "tried": len(tried),
            **self.counts,
            "errors": sorted(self.errors),
            "wrong": self.wrong,
        }

    async def _take(self, at: int) -> Interrupted:
        folder = f"{self.fault}-{at + 1}"
        (EXPORT / folder).mkdir()
        source, directory = records_at(SOURCE), str(self.mount / folder / OWNERSHIP_DIR)
        await source.claim(str(SOURCE / folder / OWNERSHIP_DIR), record(1, "host-a"))
        interrupted = Interrupted(at, self._strike(EXPORT / folder))
        with patch.object(fileops, "os", interrupted):
            believed, failures = await take_over(records_at(self.mount), directory)
        if self.fault in (Fault.DOWN, Fault.HANGS) and at >= 0:
            start_server()
        standing = await both_claim(folder, 2, self.mount)
        if at >= 0:
            self.errors |= interrupted.errors
            wrong = mistakes(believed, failures, standing, EXPORT / folder)
            self.wrong += [f"operation {at}: {one}" for one in wrong]
            self.counts[outcome_of(believed, failures)] += 1
        elif (believed, failures) != (record(2, "host-b"), []):
            self.wrong.append(f"without a fault: {believed} {failures}")
        return interrupted

    def _strike(self, folder: Path) -> Callable[[], None]:
        if self.fault in (Fault.DOWN, Fault.HANGS):
            return stop_server
        return (
            restart_server
            if self.fault is Fault.RESTARTS
            else partial(fail_over_to_a_copy, folder / OWNERSHIP_DIR)
        )


async def main(every: int) -> None:
    servant()
    print("RESULT", json.dumps(await race()), flush=True)
    for fault in Fault:
        print("RESULT", json.dumps(await Trials(fault).run(every)), flush=True)


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]))
