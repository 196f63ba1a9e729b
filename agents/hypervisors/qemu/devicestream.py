"""QEMU's own migration stream, which carries everything but shared RAM: out of one QEMU, into another.

Law: bytes are passed on as they are. Each QEMU gets one end of a socket pair by QMP; the other end is this agent's.
QEMU writes while it holds its lock, so whoever reads must never stop reading for long.
"""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType
from typing import Final

import anyio
import anyio.abc

from agents.hypervisors.qemu.errors import QemuGone, QmpFailed
from agents.hypervisors.qemu.qmp import Qmp
from migrate.devicestate import MAX_DEVICE_STATE_BYTES, STATE_PART_BYTES
from migrate.ports import DeviceStateSink

__all__ = ["Relay", "StreamEnd"]

_NAME: Final = "vmferry"
_CHUNK_BYTES: Final = 256 << 10
# QEMU writes a device state of some hundred KiB in one go.
_BUFFER_BYTES: Final = 4 << 20


class StreamEnd:
    """Our end of a pair whose other end a QEMU has under the name in `uri`."""

    uri: Final = f"fd:{_NAME}"

    def __init__(self, stream: anyio.abc.UNIXSocketStream) -> None:
        self._stream = stream

    @classmethod
    async def open(cls, qmp: Qmp) -> StreamEnd:
        """Make a pair and give one end to QEMU."""
        ours, theirs = socket.socketpair()
        try:
            for one in (ours, theirs):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            await qmp.execute("getfd", {"fdname": _NAME}, fds=(theirs.fileno(),))
            stream = await anyio.abc.UNIXSocketStream.from_socket(ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(stream)

    async def receive(self) -> bytes:
        """Give the next bytes; none when QEMU has closed its end."""
        try:
            return await self._stream.receive(_CHUNK_BYTES)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return b""

    async def send(self, part: bytes) -> None:
        """Give QEMU the next bytes.

        Raises:
            QemuGone: it closed its end: it ended, or does not want this stream.
        """
        try:
            await self._stream.send(part)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise QemuGone("QEMU does not take its device state: its end of the stream is closed") from exc

    async def finish(self) -> None:
        """There is no more to send."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """May be called twice."""
        with contextlib.suppress(anyio.BrokenResourceError):
            await self._stream.aclose()

    async def __aenter__(self) -> StreamEnd:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Relay:
    """From a QEMU's stream to a sink, in parts: reading never waits for sending.

    Tasks: `read` is one and a sender another, both in the caller's task group.
    """

    def __init__(self, stream: StreamEnd, send: DeviceStateSink) -> None:
        self._stream = stream
        self._send = send
        self._kept = bytearray()
        self._early_bytes = 0
        self._has_ended = False
        self._is_held = False
        self._changed = anyio.Event()

    async def read(self) -> None:
        """Take what QEMU writes until it closes its end; may be cancelled and called again, nothing is lost.

        Raises:
            QmpFailed: it is more than any device state is.
        """
        while part := await self._stream.receive():
            self._kept += part
            if len(self._kept) > MAX_DEVICE_STATE_BYTES:
                raise QmpFailed(
                    "migrate", "nonsense", f"more than {MAX_DEVICE_STATE_BYTES >> 20} MiB of state"
                )
            self._tell()
        self._has_ended = True
        self._tell()

    async def send_whole_parts(self) -> None:
        """Send while there is enough for a whole part, until `hold`."""
        while not self._is_held:
            if len(self._kept) >= STATE_PART_BYTES:
                await self._send(self._take(STATE_PART_BYTES), True)
            else:
                await self._changed.wait()

    def hold(self) -> None:
        """QEMU has stopped: let `send_whole_parts` end. What it wrote until now is early; the rest is not."""
        self._is_held = True
        self._early_bytes = len(self._kept)
        self._tell()

    async def send_all(self) -> None:
        """Send everything until QEMU has closed its end."""
        while self._kept or not self._has_ended:
            if self._kept:
                is_early = self._early_bytes > 0
                part = self._take(min(STATE_PART_BYTES, self._early_bytes or STATE_PART_BYTES))
                await self._send(part, is_early)
            else:
                await self._changed.wait()

    def _take(self, most_bytes: int) -> bytes:
        part = bytes(self._kept[:most_bytes])
        del self._kept[:most_bytes]
        self._early_bytes = max(self._early_bytes - len(part), 0)
        return part

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
