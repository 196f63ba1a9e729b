"""A TCP proxy on another loopback address, in front of one agent's ports, whose connections can be reset.

Law: knows bytes, neither pages nor messages. What becomes of a chunk is a subclass's to say, in `carry`.

Tasks: two per connection, in whatever task group serves the listeners; they end when that is cancelled.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

import anyio
import anyio.abc
from anyio.abc import SocketAttribute

__all__ = ["Proxy"]

CHUNK_BYTES: Final = 64 << 10
DIAL_TIMEOUT_S: Final = 5.0
# Closing with this discards what is buffered and resets the connection: neither end hears a farewell.
_LINGER_NONE: Final = struct.pack("ii", 1, 0)
_BROKEN: Final = (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError)


class Proxy:
    """Each connection that is given to `serve_connection` leads to `target_host`."""

    chunk_bytes: int = CHUNK_BYTES

    def __init__(self, target_host: str) -> None:
        self._target_host = target_host
        self._connections: set[_Connection] = set()
        self.cuts = 0

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        """Pass on what came; False ends the connection's direction. By default everything goes through."""
        await sink.send(chunk)
        return True

    def cut(self) -> None:
        """Reset all connections at once, as a cable that is cut does."""
        self.cuts += 1
        for connection in list(self._connections):
            connection.reset()

    async def serve_connection(self, port: int, near: anyio.abc.SocketStream) -> None:
        """Forward one connection to a port of the target until either end has ended."""
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
            except* _BROKEN:
                pass
            finally:
                self._connections.discard(connection)

    async def _pump(
        self, connection: _Connection, source: anyio.abc.SocketStream, sink: anyio.abc.SocketStream
    ) -> None:
        try:
            while await self.carry(await source.receive(self.chunk_bytes), sink):
                pass
        except anyio.EndOfStream:
            try:
                await sink.send_eof()
            except _BROKEN:
                connection.scope.cancel()
        except _BROKEN:
            connection.scope.cancel()


class _Connection:
    """One connection through the proxy: the caller's end and ours to the agent."""

    def __init__(self, near: anyio.abc.SocketStream, far: anyio.abc.SocketStream) -> None:
        self._ends = (near, far)
        self.scope = anyio.CancelScope()

    def reset(self) -> None:
        for stream in self._ends:
            try:
                raw = stream.extra(SocketAttribute.raw_socket)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            except _BROKEN:
                continue  # closed already
        self.scope.cancel()
