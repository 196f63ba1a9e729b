"""Calls to a storage server from the event loop: in threads of their own, and never waited for longer than a budget.

Law: a call that hangs is abandoned, not ended: its thread goes on, and what it was asked to do may still happen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from migrate.errors import StorageFailed

__all__ = ["STORAGE_TIMEOUT_S", "StorageThreads"]

# A storage server that hangs must not hang the procedures: they say so and go on without it.
STORAGE_TIMEOUT_S: Final = 20.0
# Calls at once, those included that hang: more would only queue up in the storage server.
MAX_CALLS: Final = 16

_T = TypeVar("_T")


class StorageThreads:
    """Threads that nothing else uses, so that calls that hang do not take those that everything else needs."""

    def __init__(self, timeout_s: float = STORAGE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._limiter = anyio.CapacityLimiter(MAX_CALLS)

    async def run(self, call: Callable[[], _T]) -> _T:
        """Run a blocking call.

        Raises:
            StorageFailed: the world's; it did not answer in time, and may still take effect.
        """
        try:
            with anyio.fail_after(self._timeout_s):
                return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
        except TimeoutError as exc:
            raise StorageFailed(f"the shared storage did not answer within {self._timeout_s:g} s") from exc
