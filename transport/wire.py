"""Control messages on one AnyIO byte stream: a length, then a message of the schema.

```
 0        4                     4 + length
 +--------+---------------------+
 | length | message (msgpack)   |      length: u32, big endian, 1 to limits.MAX_MESSAGE_BYTES, and to an agent
                                      1 to limits.MAX_REQUEST_BYTES
 +--------+---------------------+
```

Law: no task, no timer, no reconnection. The only place where control messages touch a stream.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Final

import anyio
import anyio.abc

from transport import limits
from transport.errors import BadMessage, FrameTooLarge, PeerGone, PeerMisbehaved
from transport.schema import Schema

__all__ = ["MessageChannel"]

_LENGTH: Final = struct.Struct("!I")
# One write to TLS makes a copy of what it is given: pieces keep that copy small of long messages.
_PIECE_BYTES: Final = 256 * limits.KIB


class MessageChannel:
    """Messages of one schema over one stream, which the channel owns.

    Several tasks may send, one at a time may receive. A receive that is cancelled loses nothing; a send that
    is cancelled half-way breaks the channel, for the peer could not find the next message.
    """

    def __init__(
        self,
        stream: anyio.abc.ByteStream,
        schema: Schema,
        *,
        max_receive_bytes: int = limits.MAX_MESSAGE_BYTES,
    ) -> None:
        """`max_receive_bytes` bounds what is held of a message that the peer has begun."""
        self._stream = stream
        self._schema = schema
        self._max_receive_bytes = max_receive_bytes
        self._received = bytearray()
        self._send_lock = anyio.Lock()
        self._broken: str | None = None

    async def send(self, message: object) -> None:
        """Give one message to the stream; that says nothing about its arrival.

        Raises:
            LocalMisuse: the message is not of the schema; nothing was sent.
            PeerGone: the stream is broken, or was broken before.
        """
        body = self._schema.encode(message)
        async with self._send_lock:
            if self._broken is not None:
                raise PeerGone(self._broken, may_have_reached_peer=False)
            # Stands until the whole message is out: an error or a cancellation leaves a torn one behind.
            self._broken = "the channel broke while a message was sent"
            frame = memoryview(_LENGTH.pack(len(body)) + body)
            try:
                for start in range(0, len(frame), _PIECE_BYTES):
                    await self._stream.send(bytes(frame[start : start + _PIECE_BYTES]))
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as exc:
                raise PeerGone(self._broken) from exc
            self._broken = None

    async def receive(self) -> object:
        """Wait for the next message.

        Raises:
            PeerGone: the stream ended or broke.
            PeerMisbehaved: not a message of the schema, or too large; the channel is dead.
        """
        try:
            length = _LENGTH.unpack(await self._take(_LENGTH.size))[0]
            if length > self._max_receive_bytes:
                raise FrameTooLarge(length, self._max_receive_bytes)
            if length == 0:
                raise BadMessage("a message of no bytes")
            # The length stays in the buffer until its body is there, so that a cancelled call can begin again.
            body = await self._take(_LENGTH.size + length)
            del self._received[: _LENGTH.size + length]
            return self._schema.decode(body[_LENGTH.size :])
        except PeerMisbehaved as exc:
            self._broken = f"the peer misbehaved: {exc}"
            raise

    async def _take(self, wanted_bytes: int) -> bytes:
        """Give the first bytes that were received, and leave them in the buffer."""
        while len(self._received) < wanted_bytes:
            if self._broken is not None:
                raise PeerGone(self._broken)
            try:
                self._received += await self._stream.receive()
            except anyio.EndOfStream as exc:
                self._broken = "the peer closed the channel"
                raise PeerGone(self._broken) from exc
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as exc:
                self._broken = "the channel broke"
                raise PeerGone(self._broken) from exc
        return bytes(memoryview(self._received)[:wanted_bytes])

    async def aclose(self) -> None:
        """Close the stream, at once when it is broken. May be called twice."""
        self._broken = self._broken or "the channel was closed"
        # What breaks while it is closed is gone, which was the wish.
        gone = suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)
        with anyio.move_on_after(1, shield=True), gone:
            await self._stream.aclose()
