"""A link that can be cut: a TCP proxy on another loopback address, in front of one agent's ports.

Law: knows bytes, neither pages nor messages. A cut ends all connections at once, with half of a chunk delivered
and the rest lost, as a cable does. Loopback only, for as long as the demo lasts.

Tasks: one per listener and three per connection, all in `serve`, which ends them when it is cancelled.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Self

import anyio
import anyio.abc
from anyio.abc import SocketAttribute

from agents.demo.proxy import Proxy

__all__ = ["CutPlan", "Cutter"]

# Only pages come in chunks as large as this; heartbeats and acknowledgements do not. A cut falls into pages.
MIN_CUT_CHUNK_BYTES: Final = 4 << 10
# After a cut both ends dial again within some 0.1 s, and must have moved something before the next.
MIN_CUT_GAP_S: Final = 0.25


class CutPlan:
    """When to cut: `cuts` times, spread evenly over the first pass over the guest's RAM. Pure."""

    def __init__(self, cuts: int) -> None:
        self._cuts = cuts
        self._first_pass_pages = 0
        self._last_cut_s = float("-inf")

    def is_due(self, *, round_number: int, remaining_pages: int, made: int, now_s: float) -> bool:
        """Say whether to cut now; `made` cuts were made so far."""
        if round_number == 0:
            self._first_pass_pages = max(self._first_pass_pages, remaining_pages)
        if made >= self._cuts or not self._first_pass_pages or now_s - self._last_cut_s < MIN_CUT_GAP_S:
            return False
        share = 1.0 if round_number else 1.0 - remaining_pages / self._first_pass_pages
        if share * (self._cuts + 1) < made + 1:
            return False
        self._last_cut_s = now_s
        return True


class Cutter(Proxy):
    """Each of `ports` on one address leads to the same port on `target_host`. Make it with `open`."""

    def __init__(
        self, target_host: str, listeners: Sequence[anyio.abc.Listener[anyio.abc.SocketStream]]
    ) -> None:
        super().__init__(target_host)
        self._listeners = listeners
        self._is_armed = False
        self.ports: Final[tuple[int, ...]] = tuple(
            listener.extra(SocketAttribute.local_port) for listener in listeners
        )
        self.forwarded_bytes = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, listen_host: str, target_host: str, *, ports: int) -> AsyncIterator[Self]:
        """Listen on so many ports that the kernel chooses; `serve` must run for anything to go through.

        Raises:
            OSError: the world's.
        """
        async with AsyncExitStack() as stack:
            listeners = [
                await stack.enter_async_context(await anyio.create_tcp_listener(local_host=listen_host))
                for _ in range(ports)
            ]
            yield cls(target_host, listeners)

    def cut_soon(self) -> None:
        """Cut all connections in the middle of the next chunk of pages."""
        self._is_armed = True

    async def serve(self) -> None:
        """Forward until cancelled."""
        async with anyio.create_task_group() as tasks:
            for listener, port in zip(self._listeners, self.ports, strict=True):
                tasks.start_soon(listener.serve, functools.partial(self.serve_connection, port))

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        """Pass on what came; an order to cut is obeyed in the middle of it."""
        if self._is_armed and len(chunk) >= MIN_CUT_CHUNK_BYTES:
            await sink.send(chunk[: len(chunk) // 2])
            # Two pumps may have seen the order to cut: one obeys.
            if self._is_armed:
                self._is_armed = False
                self.cut()
            return False
        await sink.send(chunk)
        self.forwarded_bytes += len(chunk)
        return True
