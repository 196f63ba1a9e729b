"""What a destination does with a guest's ownership records, and a way to strike at each operation of it.

Law: imports nothing that a small machine does not have: `tests.nfs` runs this inside of one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import anyio

from migrate.errors import NotRecorded, StorageFailed
from migrate.ownership import Ownership

__all__ = [
    "CALLS",
    "GUEST",
    "OUTCOMES",
    "Interrupted",
    "Records",
    "both_ask",
    "mistakes",
    "outcome_of",
    "record",
    "take_over",
]

GUEST: Final = "g-1"
# Of a claim that something failed in.
OUTCOMES: Final = ("claimed", "refused", "unknown", "not begun")
# Those calls of `os` that go to a storage server.
CALLS: Final = frozenset(
    {"open", "read", "write", "fsync", "fstat", "link", "listdir", "lstat", "mkdir", "stat", "unlink"}
)


class Records(Protocol):
    """What is asked of records, as `migrate.ports.SharedStorage` and stores alone have it."""

    async def latest(self, directory: str, guest_id: str) -> Ownership | None: ...
    async def claim(self, directory: str, wanted: Ownership) -> Ownership: ...
    async def stage_claim(self, directory: str, wanted: Ownership) -> None: ...
    async def tidy(self, directory: str, guest_id: str) -> None: ...


@dataclass
class Interrupted:
    """`os`, which tells `strike` just before its `at`-th call that goes to the storage; at < 0: it counts only.

    `errors` are those that calls ended with, as errno names them.
    """

    at: int
    strike: Callable[[], None]
    calls: list[str] = field(default_factory=list)
    errors: set[str] = field(default_factory=set)

    def __getattr__(self, name: str) -> object:
        original = getattr(os, name)
        if name not in CALLS:
            return original

        def call(*arguments: object, **options: object) -> object:
            self.calls.append(name)
            if len(self.calls) == self.at + 1:
                self.strike()
            try:
                return original(*arguments, **options)
            except OSError as exc:
                self.errors.add(errno.errorcode.get(exc.errno or 0, str(exc.errno)))
                raise

        return call


def record(generation: int, owner: str) -> Ownership:
    """A record of the one guest."""
    return Ownership(guest_id=GUEST, generation=generation, owner=owner, migration_id="m-1")


async def take_over(storage: Records, directory: str) -> tuple[Ownership | None, list[str]]:
    """Do what a destination does; give what it believes of its claim, and what failed."""
    steps: list[Callable[[], Awaitable[Ownership | None]]] = [
        partial(storage.latest, directory, GUEST),
        partial(storage.stage_claim, directory, record(2, "host-b")),
        partial(storage.claim, directory, record(2, "host-b")),
        partial(storage.claim, directory, record(3, "host-b")),
        partial(storage.tidy, directory, GUEST),
    ]
    believed: Ownership | None = None
    failures: list[str] = []
    for number, step in enumerate(steps):
        try:
            found = await step()
        except StorageFailed as exc:
            failures.append(f"{number} {type(exc).__name__}")
            # Without these there is no claim, and without a claim no word that the guest runs.
            if number <= 2:
                break
        else:
            believed = found if number == 2 else believed
    return believed, failures


async def both_ask(wanted: Mapping[str, tuple[Records, str]], generation: int) -> dict[str, Ownership]:
    """Have hosts ask for one generation at once, each in its records and directory; give what each is told."""
    standing: dict[str, Ownership] = {}

    async def ask(host: str, records: Records, directory: str) -> None:
        standing[host] = await records.claim(directory, record(generation, host))

    async with anyio.create_task_group() as tasks:
        for host, (records, directory) in wanted.items():
            tasks.start_soon(ask, host, records, directory)
    return standing


def outcome_of(believed: Ownership | None, failures: list[str]) -> str:
    """Say which of OUTCOMES a taking-over had."""
    if f"2 {NotRecorded.__name__}" in failures:
        return "refused"
    if any(failure.startswith("2 ") for failure in failures):
        return "unknown"
    return "claimed" if believed is not None else "not begun"


def mistakes(
    believed: Ownership | None, failures: list[str], standing: Mapping[str, Ownership], folder: Path
) -> list[str]:
    """Say what is not as it must be when both hosts have asked again; `folder` is the server's own."""
    found = []
    # A word that the guest runs may come late, and is of the same owner.
    owners = {one.owner for one in standing.values()}
    if len(owners) != 1:
        found.append(f"several owners: {failures} {standing}")
    if believed is not None and believed.owner not in owners:
        found.append(f"another owner than was believed: {believed} {failures} {standing}")
    if outcome_of(believed, failures) == "refused":
        # It was told so before the source had asked for anything: nothing of it may stand.
        names = sorted(path.name for path in folder.rglob(f"{GUEST}.*"))
        if len(names) != 2:
            found.append(f"refused, and recorded all the same: {names}")
    return found
