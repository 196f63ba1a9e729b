"""Runs seeds in virtual time: the clock, the threads that are none, and the seed's own kind of weather."""

from __future__ import annotations

import logging
import os
import random
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Final
from unittest.mock import patch

import anyio
import trio
import trio.testing

from migrate.errors import first_failure
from migrate.source_ports import SourcePorts
from tests.sim.faults import Faults, Outcome
from tests.sim.lives import in_place_of_a_thread, mortal_journals
from tests.sim.world import World

__all__ = ["run_seed"]

# Journals are written durably, and the disk of this machine is not what is tried.
IN_MEMORY: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None


@contextmanager
def _virtual_world(rng: random.Random) -> Iterator[None]:
    def seeded_uuid() -> uuid.UUID:
        return uuid.UUID(int=rng.getrandbits(128))

    logs_above = logging.root.manager.disable
    # What agents say is in the story; a thousand crashes a minute would fill a terminal.
    logging.disable(logging.CRITICAL)
    try:
        with (
            patch("anyio.to_thread.run_sync", in_place_of_a_thread),
            # Views that nobody looks at need not come twenty times a second, nor memory go back to the kernel.
            patch("migrate.source.PROGRESS_EVERY_S", 5.0),
            patch("agents.host.outgoing.migration_ended"),
            patch("agents.host.incoming.migration_ended"),
            patch("agents.host.outgoing.uuid", SimpleNamespace(uuid4=seeded_uuid)),
            # What is decided by figures is decided by the virtual clock's.
            patch("agents.host.outgoing.SourcePorts", partial(SourcePorts, clock=anyio.current_time)),
            # The order of tasks that are ready at once is trio's own dice; those that a scope cancels come in none.
            patch("trio._core._run._r", random.Random(rng.random())),
            patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True),
            mortal_journals(),
        ):
            yield
    finally:
        logging.disable(logs_above)


def run_seed(seed: int) -> Outcome:
    """Live through one seed. Raises TheoremBroken.

    Of three, one has nothing but short outages, one nothing but agents that die, and one a day of everything.
    """
    rng = random.Random(seed)
    faults = (Faults.short_outages_only(), Faults.deaths_only(), Faults.of_a_day(rng))[seed % 3]

    async def live() -> Outcome:
        return await World(seed, faults, rng, Path(folder)).run()

    with tempfile.TemporaryDirectory(prefix="vmferry-sim-", dir=IN_MEMORY) as folder, _virtual_world(rng):
        try:
            return trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseExceptionGroup as group:
            raise first_failure(group) from group
