"""Runs seeds in virtual time: the clock, the threads that are none, and the seed's own kind of weather."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from unittest.mock import patch

import anyio
import anyio.lowlevel
import trio
import trio.testing

from migrate.errors import first_failure
from tests.sim.world import Faults, Outcome, World

__all__ = ["run_seed"]

_T = TypeVar("_T")


async def _call(call: Callable[..., _T], *arguments: object, **options: object) -> _T:
    """In place of a worker thread: the same, at once, in this task."""
    await anyio.lowlevel.checkpoint()
    return call(*arguments)


@contextmanager
def _virtual_world() -> Iterator[None]:
    with (
        patch("anyio.to_thread.run_sync", _call),
        # Views that nobody looks at need not come twenty times a second.
        patch("migrate.source.PROGRESS_EVERY_S", 5.0),
    ):
        yield


def run_seed(seed: int) -> Outcome:
    """Live through one seed; every third has nothing but short outages. Raises TheoremBroken."""
    rng = random.Random(seed)
    faults = Faults.short_outages_only() if seed % 3 == 0 else Faults.of_a_day(rng)
    # The order of tasks that are ready at once is trio's own dice.
    trio._core._run._r = random.Random(seed)

    async def live() -> Outcome:
        return await World(seed, faults, rng).run()

    with _virtual_world():
        try:
            return trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseExceptionGroup as group:
            raise first_failure(group) from group
