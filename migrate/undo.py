"""Compensation: what was done is taken back, newest first, shielded, each step within its own time.

Law: a step that fails or hangs never keeps the older ones from running, and is named in the error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import anyio

__all__ = ["STEP_BUDGET_S", "UndoStack"]

# Long enough for a hypervisor that is busy with the host's own trouble, short enough for an operator.
STEP_BUDGET_S: Final = 10.0


class UndoStack:
    """Steps that take back what a migration has done so far."""

    def __init__(self, step_budget_s: float = STEP_BUDGET_S) -> None:
        self._step_budget_s = step_budget_s
        self._steps: list[tuple[str, Callable[[], Awaitable[None]]]] = []

    def push(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        """Remember a step; `name` says what would be left behind without it."""
        self._steps.append((name, step))

    def forget(self) -> None:
        """What was done stays done."""
        self._steps.clear()

    async def run(self) -> tuple[str, ...]:
        """Take everything back; give the names of the steps that failed, each with its reason."""
        leftovers: list[str] = []
        with anyio.CancelScope(shield=True):
            while self._steps:
                name, step = self._steps.pop()
                try:
                    with anyio.fail_after(self._step_budget_s):
                        await step()
                except TimeoutError:
                    leftovers.append(f"{name} (no answer within {self._step_budget_s:g} s)")
                except Exception as exc:  # a task's edge: every older step still has to run
                    leftovers.append(f"{name} ({exc})")
        return tuple(leftovers)
