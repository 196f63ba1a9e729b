from __future__ import annotations

import anyio
import pytest

from migrate.undo import UndoStack

pytestmark = pytest.mark.anyio


async def test_steps_are_taken_back_newest_first() -> None:
    order: list[str] = []
    undo = UndoStack()
    for name in ("first", "second", "third"):

        async def step(name: str = name) -> None:
            order.append(name)

        undo.push(name, step)
    assert await undo.run() == ()
    assert order == ["third", "second", "first"]
    assert await undo.run() == ()


async def test_a_step_that_fails_or_hangs_is_named_and_keeps_nobody() -> None:
    done: list[str] = []

    async def works() -> None:
        done.append("works")

    async def fails() -> None:
        raise OSError("broken")

    undo = UndoStack(step_budget_s=0.01)
    undo.push("works", works)
    undo.push("fails", fails)
    undo.push("hangs", anyio.sleep_forever)
    assert await undo.run() == ("hangs (no answer within 0.01 s)", "fails (broken)")
    assert done == ["works"]


async def test_what_was_forgotten_stays_done() -> None:
    undo = UndoStack()
    undo.push("hangs", anyio.sleep_forever)
    undo.forget()
    assert await undo.run() == ()


async def test_cancellation_does_not_reach_the_steps() -> None:
    done: list[str] = []

    async def slow() -> None:
        await anyio.lowlevel.checkpoint()
        done.append("slow")

    undo = UndoStack()
    undo.push("slow", slow)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await undo.run()
    assert done == ["slow"]
