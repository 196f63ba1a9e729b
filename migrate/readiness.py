"""What must be done before a guest may stop: the second preflight and the arming, beside the rounds before its stop.

Law: knows nothing of either but how long a preflight counts. A move that waits for both when its rounds are over has
the guest write on meanwhile, and copies that again: on a long link they are three round trips. So they begin when a
stop is in sight, and what they find is asked for again if the stop does not come soon.

Tasks: one, in the task group of whoever begins it; a failure of it is that group's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import anyio
import anyio.abc

__all__ = ["PREFLIGHT_HOLDS_S", "Readiness"]

# What can change under a move (a full host, a lost mount, a lock) is looked at so shortly before its stop.
PREFLIGHT_HOLDS_S: Final = 2.0


class Readiness:
    """Of one pre-copy: a guest that came back from a stop needs a new one.

    Args:
        examine: the second preflight; raises if anything speaks against the stop.
        arm: has both ends make everything ready for COMMIT; done once.
    """

    def __init__(self, examine: Callable[[], Awaitable[None]], arm: Callable[[], Awaitable[None]]) -> None:
        self._examine = examine
        self._arm = arm
        self._has_begun = False
        self._is_armed = anyio.Event()
        self._asked_at_s = 0.0

    def begin(self, tasks: anyio.abc.TaskGroup) -> None:
        """Begin, unless it has. No page of an earlier stop may be under way any more: arming ends what it was for."""
        if not self._has_begun:
            self._has_begun = True
            tasks.start_soon(self._run)

    async def reached(self, tasks: anyio.abc.TaskGroup) -> bool:
        """Return when the guest may stop; say whether that was so at once, and the guest wrote nothing meanwhile."""
        self.begin(tasks)
        is_at_once = self._is_armed.is_set()
        await self._is_armed.wait()
        if anyio.current_time() - self._asked_at_s > PREFLIGHT_HOLDS_S:
            await self._look()
            return False
        return is_at_once

    async def _run(self) -> None:
        await self._look()
        await self._arm()
        self._is_armed.set()

    async def _look(self) -> None:
        self._asked_at_s = anyio.current_time()
        await self._examine()
