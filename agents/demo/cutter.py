"""A link that can be cut: a TCP proxy on another loopback address, in front of one agent's ports.

Law: knows bytes, neither pages nor messages. A cut ends all connections at once, with half of a chunk delivered
and the rest lost, as a cable does. Loopback only, for as long as the demo lasts.

Tasks: one per listener and three per connection, all in `serve`, which ends them when it is cancelled.
"""

from __future__ import annotations

import functools
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Self

import anyio
import anyio.abc
from anyio.abc import SocketAttribute

__all__ = ["CutPlan", "Cutter"]

CHUNK_BYTES: Final = 64 << 10
# Only pages come in chunks as large as this; heartbeats and acknowledgements do not. A cut falls into pages.
MIN_CUT_CHUNK_BYTES: Final = 4 << 10
# After a cut both ends dial again within some 0.1 s, and must have moved something before the next.
MIN_CUT_GAP_S: Final = 0.25
DIAL_TIMEOUT_S: Final = 5.0
# Closing with this discards what is buffered and resets the connection: neither end hears a farewell.
_LINGER_NONE: Final = struct.pack("ii", 1, 0)
_BROKEN: Final = (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError)


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


class _Connection:
    """One connection through the proxy: the caller's end and ours to the agent."""

    def __init__(self, near: anyio.abc.SocketStream, far: anyio.abc.SocketStream) -> None:
        self.near = near
        self.far = far
        self.scope = anyio.CancelScope()

    def cut(self) -> None:
        for stream in (self.near, self.far):
            raw = stream.extra(SocketAttribute.raw_socket)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        self.scope.cancel()


class Cutter:
    """The proxy: each of `ports` on one address leads to the same port on `target_host`. Make it with `open`."""

    def __init__(
        self, target_host: str, listeners: Sequence[anyio.abc.Listener[anyio.abc.SocketStream]]
    ) -> None:
        self._target_host = target_host
        self._listeners = listeners
        self._connections: set[_Connection] = set()
        self._is_armed = False
        self.ports: Final[tuple[int, ...]] = tuple(
            listener.extra(SocketAttribute.local_port) for listener in listeners
        )
        self.cuts = 0
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
                tasks.start_soon(listener.serve, functools.partial(self._serve_connection, port))

    async def _serve_connection(self, port: int, near: anyio.abc.SocketStream) -> None:
        async with near:
            try:
                with anyio.fail_after(DIAL_TIMEOUT_S):
                    far = await anyio.connect_tcp(self._target_host, port)
            except (OSError, TimeoutError):
                return
            connection = _Connection(near, far)
            self._connections.add(connection)
            try:
                async with far:
                    with connection.scope:
                        async with anyio.create_task_group() as pumps:
                            pumps.start_soon(self._pump, connection, near, far)
                            pumps.start_soon(self._pump, connection, far, near)
            finally:
                self._connections.discard(connection)

    async def _pump(
        self, connection: _Connection, source: anyio.abc.SocketStream, sink: anyio.abc.SocketStream
    ) -> None:
        try:
            while True:
                chunk = await source.receive(CHUNK_BYTES)
                if self._is_armed and len(chunk) >= MIN_CUT_CHUNK_BYTES:
                    await sink.send(chunk[: len(chunk) // 2])
                    self._cut()
                    return
                await sink.send(chunk)
                self.forwarded_bytes += len(chunk)
        except anyio.EndOfStream:
            try:
                await sink.send_eof()
            except _BROKEN:
                connection.scope.cancel()
        except _BROKEN:
            connection.scope.cancel()

    def _cut(self) -> None:
        # Two pumps may have seen the order to cut: one obeys.
        if self._is_armed:
            self._is_armed = False
            self.cuts += 1
            for connection in list(self._connections):
                connection.cut()
