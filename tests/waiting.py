"""Waiting for what other processes do, and looking at it meanwhile: the one place of the tests where real time passes.

Law: nothing waits for a time to be over, only for something to be seen; and what is not seen in time is a failure that
says what was missing. What is slow on purpose says so (`delay`). Tests of one process wait for
its events, or have a clock of their own. The linter refuses every other sleep.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final, TypeVar, cast, overload

import anyio

__all__ = ["LOOK_EVERY_S", "delay", "delay_blocking", "looks", "looks_blocking", "until", "until_blocking"]

LOOK_EVERY_S: Final = 0.02
WITHIN_S: Final = 10.0

T = TypeVar("T")


What = str | Callable[[], str]


@overload
async def until(
    look: Callable[[], Awaitable[T | None]], what: What, *, within_s: float = ..., every_s: float = ...
) -> T: ...
@overload
async def until(
    look: Callable[[], T | None], what: What, *, within_s: float = ..., every_s: float = ...
) -> T: ...
async def until(
    look: Callable[[], Awaitable[T | None] | T | None],
    what: What,
    *,
    within_s: float = WITHIN_S,
    every_s: float = LOOK_EVERY_S,
) -> T:
    """Look until something is seen (whatever is true), and give it; a look that hangs is given up in time, too.

    Raises:
        AssertionError: `what` is not there in time. It may be made when it is needed: of a log, say.
    """
    with anyio.move_on_after(within_s):
        async for _ in looks(every_s):
            seen = look()
            if inspect.isawaitable(seen):
                seen = await seen
            if seen:
                return cast("T", seen)
    raise _missed(what, within_s)


def until_blocking(
    look: Callable[[], T | None], what: What, *, within_s: float = WITHIN_S, every_s: float = LOOK_EVERY_S
) -> T:
    """As `until`, for worker threads and fixtures; here a look that hangs is waited for."""
    ends_s = time.monotonic() + within_s
    for _ in looks_blocking(every_s):
        if seen := look():
            return seen
        if time.monotonic() > ends_s:
            break
    raise _missed(what, within_s)


def _missed(what: What, within_s: float) -> AssertionError:
    return AssertionError(f"not within {within_s:g} s: {what if isinstance(what, str) else what()}")


def looks(every_s: float) -> AsyncIterator[None]:
    """Give a turn at once and then so often, until whoever takes them is cancelled or has seen enough."""
    return _Looks(every_s)


class _Looks:
    """No generator: one that is left early is closed by whoever runs the loop, at some time, with a warning on trio."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._has_begun = False

    def __aiter__(self) -> _Looks:
        return self

    async def __anext__(self) -> None:
        if self._has_begun:
            await anyio.sleep(self._every_s)
        self._has_begun = True


def looks_blocking(every_s: float) -> Iterator[None]:
    """As `looks`, for threads."""
    while True:
        yield
        time.sleep(every_s)


async def delay(seconds: float) -> None:
    """Be slow: a link, a server or a round that takes so long is what the test is about. Nobody waits with this."""
    await anyio.sleep(seconds)


def delay_blocking(seconds: float) -> None:
    """As `delay`, for threads."""
    time.sleep(seconds)
