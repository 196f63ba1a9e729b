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
from migrate.devicestate import MAX_DEVICE_STATE_BYTES
from migrate.ports import DeviceStateSink

__all__ = ["StreamEnd"]

_NAME: Final = "vmferry"
_CHUNK_BYTES: Final = 256 << 10
# QEMU writes a device state of some hundred KiB in one go.
_BUFFER_BYTES: Final = 4 << 20


class StreamEnd:
    """Our end of a pair whose other end a QEMU has under the name in `uri`."""

    uri: Final = f"fd:{_NAME}"

    def __init__(self, stream: anyio.abc.UNIXSocketStream) -> None:
        self._stream = stream
        self._taken_bytes = 0

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

    async def read_all(self, send: DeviceStateSink) -> None:
        """Take what QEMU writes until it closes its end; may be cancelled and called again, nothing is lost.

        Raises:
            QmpFailed: it is more than any device state is.
        """
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                part = await self._stream.receive(_CHUNK_BYTES)
                self._taken_bytes += len(part)
                if self._taken_bytes > MAX_DEVICE_STATE_BYTES:
                    raise QmpFailed(
                        "migrate", "nonsense", f"more than {MAX_DEVICE_STATE_BYTES >> 20} MiB of state"
                    )
                send(part)

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
