"""A man in the middle of data connections: he sees whole sealed records, and may send each wherever he likes.

Law: he has no key. What becomes of a record is a subclass's to say, in `meddle`; everything else passes untouched.

Tasks: those of `agents.demo.proxy.Proxy`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final

import anyio
import anyio.abc

from agents.demo.proxy import Proxy
from tests.agents.host.network import FRONTS
from transport.frames import HEADER_BYTES, TAG_BYTES
from transport.hello import HELLO_BYTES

__all__ = ["Meddler", "Way", "meddling"]

_HELLO_MAGIC: Final = b"VMFD"
_BROKEN: Final = (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError)


class Way:
    """From a source to the destination, on one data connection."""

    def __init__(self, sink: anyio.abc.SocketStream, hello: bytes) -> None:
        self.sink = sink
        self.session_id = hello[8:24]
        self.slot = int.from_bytes(hello[6:8], "big")
        self.is_open = True
        # All of it from the hello on, as it came.
        self.recorded = bytearray(hello)
        self._sending = anyio.Lock()

    async def send(self, record: bytes) -> None:
        """Send one whole record there."""
        async with self._sending:
            try:
                await self.sink.send(record)
            except _BROKEN:
                self.is_open = False


class Meddler(Proxy):
    """What lies before an agent's ports; `ways` are the data connections, newest last."""

    def __init__(self, target_host: str) -> None:
        super().__init__(target_host)
        self.ways: list[Way] = []
        self.is_recording = False
        self._pending: dict[int, bytearray] = {}
        self._way_of: dict[int, Way | None] = {}
        # Kept, so that no later one has the same identity.
        self._sinks: list[anyio.abc.SocketStream] = []

    async def meddle(self, way: Way, record: bytes) -> Iterable[tuple[Way, bytes]]:
        """Give what is sent, and where, now that this record has come on this way."""
        return [(way, record)]

    async def back(self, chunk: bytes) -> bool:
        """Say whether what comes from the destination, or on a control connection, is passed on."""
        return True

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        """Find the records in what came."""
        pending = self._pending.get(id(sink))
        if pending is None:
            pending = self._pending[id(sink)] = bytearray()
            self._sinks.append(sink)
            if not chunk.startswith(_HELLO_MAGIC):
                self._way_of[id(sink)] = None
        if id(sink) in self._way_of and self._way_of[id(sink)] is None:
            if await self.back(chunk):
                await sink.send(chunk)
            return True
        pending += chunk
        way = self._way_of.get(id(sink))
        if way is None:
            if len(pending) < HELLO_BYTES:
                return True
            way = self._way_of[id(sink)] = Way(sink, bytes(pending[:HELLO_BYTES]))
            for earlier in self.ways:
                # It has dialled again because that one broke.
                if (earlier.session_id, earlier.slot) == (way.session_id, way.slot):
                    earlier.is_open = False
            self.ways.append(way)
            del pending[:HELLO_BYTES]
            await sink.send(bytes(way.recorded))
        while (record := _take_record(pending)) is not None:
            if self.is_recording:
                way.recorded += record
            for there, what in await self.meddle(way, record):
                await there.send(what)
        return way.is_open


def _take_record(pending: bytearray) -> bytes | None:
    if len(pending) < HEADER_BYTES:
        return None
    whole_bytes = HEADER_BYTES + int.from_bytes(pending[4:8], "big") + TAG_BYTES
    if len(pending) < whole_bytes:
        return None
    record = bytes(pending[:whole_bytes])
    del pending[:whole_bytes]
    return record


@asynccontextmanager
async def meddling(meddler: Meddler, host: str, *ports: int) -> AsyncIterator[None]:
    """Put him in front of a host, whose ports these are."""
    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        for port in ports:
            listener = await stack.enter_async_context(
                await anyio.create_tcp_listener(local_host=FRONTS[host], local_port=port)
            )
            tasks.start_soon(partial(listener.serve, partial(meddler.serve_connection, port)))
        yield
        tasks.cancel_scope.cancel()
