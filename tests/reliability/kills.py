"""Agents that are killed at every instant that matters (`tests.reliability.mortal`), and started again."""

from __future__ import annotations

import subprocess
import time
from enum import StrEnum
from pathlib import Path
from typing import Final

from anyio.to_thread import run_sync

from tests.reliability.stage import Kind, Stage, Tally, stage
from tests.waiting import LOOK_EVERY_S, looks

__all__ = ["Role", "try_kills"]

DIES_WITHIN_S: Final = 20.0
DIES_AFTER_S: Final = 1.0
MOST_INSTANTS: Final = 64


class Role(StrEnum):
    """Which of the two agents is killed."""

    SOURCE = "source"
    DESTINATION = "destination"


async def try_kills(kind: Kind, event_loop: str, role: Role, *, every: int = 1) -> tuple[Tally, list[str]]:
    """Move a guest again and again while one agent dies, an instant later each time; give what it died at.

    Some instants come side by side, and in another order in the next move: what the numbers of a series of all
    instants passed over is died at by its name.
    """
    died_at: list[str] = []
    async with stage(kind, event_loop, has_networks=False) as place:
        # The first move of a guest claims its first generation as well; all later ones are alike.
        async with place.trial():
            pass
        place.tally = Tally()
        for number in range(0, MOST_INSTANTS, every):
            name = await _kill_at(place, role, number)
            if name is None:
                break
            died_at.append(name)
        else:
            raise AssertionError(f"there is no end of instants: {died_at}")
        if every == 1:
            for name in _instants(place).read_text().splitlines():
                if name not in died_at and await _kill_at(place, role, name) is not None:
                    died_at.append(name)
        return place.tally, died_at


def _instants(place: Stage) -> Path:
    """Where the agent that is to die writes the instants of a move."""
    return place.processes.fleet.folder / "instants"


async def _kill_at(place: Stage, role: Role, fatal: int | str) -> str | None:
    """Let an agent die in the course of a move, then start it again; None: the move has no such instant."""
    processes = place.processes
    host = place.home if role is Role.SOURCE else place.away
    instants = _instants(place)
    instants.unlink(missing_ok=True)
    await run_sync(processes.kill, host)
    processes.programs[host] = ["-m", "tests.reliability.mortal", str(instants), str(fatal)]
    await run_sync(processes.start, host)
    del processes.programs[host]
    async with place.trial():
        died = await _dies(place, processes.running[host])
        if died:
            processes.running.pop(host)
            await run_sync(processes.start, host)
    if not died:
        # It must not die in a later move, in which it may be the other end.
        await run_sync(processes.kill, host)
        await run_sync(processes.start, host)
        return None
    return instants.read_text().splitlines()[-1]


async def _dies(place: Stage, process: subprocess.Popen[bytes]) -> bool:
    """Wait for an agent's death, and a while after the move has ended: that is when the last entries are written."""
    deadline_s = time.monotonic() + DIES_WITHIN_S
    async for _ in looks(LOOK_EVERY_S):
        if process.poll() is not None or time.monotonic() >= deadline_s:
            break
        if await place.rests(place.home):
            deadline_s = min(deadline_s, time.monotonic() + DIES_AFTER_S)
    return process.poll() is not None
