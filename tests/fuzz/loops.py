"""Event loops and streams for targets that await: every input lives through asyncio and through trio.

Law: whatever an input does, it does on both loops: the outcomes are compared. Nothing here waits for real time.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import trio

from tests.fuzz.target import law

__all__ = ["LOOPS", "ScriptedStream", "on_both_loops"]

T = TypeVar("T")
LOOPS: Final = ("asyncio", "trio")


def on_both_loops(live: Callable[[], Awaitable[T]]) -> T:
    """Run one input on each loop, and give what came out, which is the same on both. Raises what it raises."""
    outcomes: list[T] = []
    failures: list[Exception] = []
    for loop in LOOPS:
        # The order of tasks that are ready at once is trio's own dice.
        trio._core._run._r = random.Random(0)
        try:
            outcomes.append(anyio.run(live, backend=loop))
        except Exception as exc:
            failures.append(exc)
    law(not failures or not outcomes, f"one loop gives {outcomes}, the other raises {failures}")
    if failures:
        one, other = failures
        law(type(one) is type(other), f"{one!r} on {LOOPS[0]}, and {other!r} on {LOOPS[1]}")
        raise one
    law(outcomes[0] == outcomes[1], f"{outcomes[0]!r} on {LOOPS[0]}, and {outcomes[1]!r} on {LOOPS[1]}")
    return outcomes[0]


class ScriptedStream(anyio.abc.ByteStream):
    """A stream whose other end said everything beforehand, piece by piece, and then hung up. Keeps what is sent."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.sent = bytearray()
        self.is_closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if self.is_closed:
            raise anyio.ClosedResourceError
        if not self._pieces:
            raise anyio.EndOfStream
        piece = self._pieces[0][:max_bytes]
        self._pieces[0] = self._pieces[0][max_bytes:]
        if not self._pieces[0]:
            del self._pieces[0]
        return piece

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        if self.is_closed:
            raise anyio.ClosedResourceError
        self.sent += item

    async def send_eof(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.is_closed = True
        await anyio.lowlevel.checkpoint()


def in_pieces(data: bytes, piece_bytes: int) -> list[bytes]:
    """Cut what a peer sends, as a network might."""
    return [data[at : at + piece_bytes] for at in range(0, len(data), max(piece_bytes, 1))]
