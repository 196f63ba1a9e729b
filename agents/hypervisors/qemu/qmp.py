"""QMP, QEMU's control protocol: commands, replies and events over one unix socket.

Law: the only module that knows its syntax. QEMU is not trusted: a line has a limit, what is no JSON object is
`QmpFailed`, and silence is `QemuGone`. No task of its own: whoever waits for something reads, and keeps events for
others. A monitor serves one client at a time, so connections are short or owned by one migration. A slow QEMU answers a
client that gave up when the next one is there already: replies have numbers that belong to one connection alone.

Source: QEMU docs/interop/qmp-spec.rst. (The qemu.qmp package is asyncio only.)
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import anyio
import anyio.abc

from agents.hypervisors.qemu.errors import QemuGone, QmpFailed

__all__ = ["QMP_TIMEOUT_S", "Json", "Qmp", "event_time_s", "field_of"]

# What json.loads gives.
Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

# A command that takes longer than this has met a storage server that hangs, or a QEMU that does.
QMP_TIMEOUT_S: Final = 10.0
# The longest answer is that to qom-list-types, some 100 KiB; query-machines has 20.
MAX_LINE_BYTES: Final = 4 << 20
# Events that nobody asked for are dropped, oldest first.
MAX_EVENTS: Final = 256
_CHUNK_BYTES: Final = 64 << 10
# Each connection begins at a number of its own. JSON's are exact below 2**53.
_FIRST_IDS: Final = 1 << 52


class Qmp:
    """One connection. Tasks may share it: they take turns. Close it."""

    def __init__(self, stream: anyio.abc.UNIXSocketStream, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._buffer = bytearray()
        self._events: list[dict[str, Json]] = []
        self._next_id = secrets.randbelow(_FIRST_IDS)
        self._turn = anyio.Lock()

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float = QMP_TIMEOUT_S) -> Qmp:
        """Connect and shake hands.

        Raises:
            QemuGone: nobody listens there, or another client has the monitor and does not let go.
            QmpFailed: what listens there is no QMP server.
        """
        try:
            with anyio.fail_after(timeout_s):
                stream = await anyio.connect_unix(path)
        except OSError as exc:
            raise QemuGone(f"no QEMU listens on {path}: {exc.strerror or exc}") from exc
        qmp = cls(stream, path)
        try:
            try:
                with anyio.fail_after(timeout_s):
                    greeting = await qmp._read_message()
                    while "QMP" not in greeting and greeting.keys() & {"return", "error", "event"}:
                        # For the client before this one, which had given up.
                        greeting = await qmp._read_message()
            except TimeoutError as exc:
                raise QemuGone(
                    f"the monitor {path} gave no greeting within {timeout_s:g} s: another client holds it"
                ) from exc
            if "QMP" not in greeting:
                raise QmpFailed("a connection", "nonsense", f"{path} is no QMP monitor")
            await qmp.execute("qmp_capabilities", timeout_s=timeout_s)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await stream.aclose()
            raise
        return qmp

    @property
    def peer_pid(self) -> int:
        """The process at the other end."""
        return peer_pid_of(self._stream)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = QMP_TIMEOUT_S,
    ) -> Json:
        """Give the reply to one command.

        Raises:
            QmpFailed: QEMU says no, or answers nonsense.
            QemuGone: it ended, or did not answer in time: it may have obeyed.
        """
        number = self._next_id
        self._next_id += 1
        request: dict[str, object] = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = arguments
        line = json.dumps(request).encode() + b"\n"
        try:
            with anyio.fail_after(timeout_s):
                async with self._turn:
                    await self._send(line, fds)
                    while (reply := self._reply_in(await self._read_message(), number)) is None:
                        pass
        except TimeoutError as exc:
            raise QemuGone(f"QEMU did not answer {command} within {timeout_s:g} s") from exc
        if isinstance(error := reply.get("error"), dict):
            raise QmpFailed(command, str(error.get("class", "")), str(error.get("desc", error))[:1000])
        return reply.get("return")

    async def wait_event(
        self,
        name: str,
        is_wanted: Callable[[dict[str, Json]], bool] = lambda data: True,
        *,
        timeout_s: float = QMP_TIMEOUT_S,
    ) -> dict[str, Json]:
        """Give the first event of that name whose data is wanted; older ones that nobody took count too.

        Raises:
            QemuGone: it ended, or none came in time.
        """
        try:
            with anyio.fail_after(timeout_s):
                async with self._turn:
                    while (event := self._take_event(name, is_wanted)) is None:
                        self._reply_in(await self._read_message(), None)
                    return event
        except TimeoutError as exc:
            raise QemuGone(f"QEMU did not tell {name} within {timeout_s:g} s") from exc

    def forget_events(self) -> None:
        """Drop what came before: what is waited for next is new."""
        self._events.clear()

    async def human(self, line: str) -> str:
        """Give what the human monitor prints: for the few facts that QMP does not have."""
        printed = await self.execute("human-monitor-command", {"command-line": line})
        if not isinstance(printed, str):
            raise QmpFailed(line, "nonsense", "the human monitor printed no text")
        return printed

    async def aclose(self) -> None:
        """May be called twice."""
        await self._stream.aclose()

    def _take_event(self, name: str, is_wanted: Callable[[dict[str, Json]], bool]) -> dict[str, Json] | None:
        for at, event in enumerate(self._events):
            data = event.get("data")
            if event.get("event") == name and is_wanted(data if isinstance(data, dict) else {}):
                return self._events.pop(at)
        return None

    def _reply_in(self, message: dict[str, Json], number: int | None) -> dict[str, Json] | None:
        """Give the message if it is the reply of that number; keep an event, drop a reply that nobody waits for."""
        if "event" in message:
            self._events.append(message)
            del self._events[:-MAX_EVENTS]
            return None
        answered = message.get("id")
        if not isinstance(answered, int):
            raise QmpFailed("a command", "nonsense", f"{self._path} answered without an id")
        return message if answered == number else None

    async def _send(self, line: bytes, fds: Sequence[int]) -> None:
        try:
            if fds:
                await self._stream.send_fds(line, list(fds))
            else:
                await self._stream.send(line)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise QemuGone(f"the QEMU behind {self._path} has ended") from exc

    async def _read_message(self) -> dict[str, Json]:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise QmpFailed("a command", "nonsense", f"{self._path} sends a line without an end")
            try:
                self._buffer += await self._stream.receive(_CHUNK_BYTES)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
                raise QemuGone(f"the QEMU behind {self._path} has ended") from exc
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise QmpFailed("a command", "nonsense", f"{self._path} does not speak JSON") from exc
        if not isinstance(message, dict):
            raise QmpFailed("a command", "nonsense", f"{self._path} sends something else than objects")
        return message


def peer_pid_of(stream: anyio.abc.UNIXSocketStream) -> int:
    """Give the process that listens at the other end of a unix socket."""
    raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(pid)


def event_time_s(event: Mapping[str, Json]) -> float:
    """Give when QEMU sent an event: seconds since the epoch, by the clock of this host."""
    stamp = event.get("timestamp")
    if isinstance(stamp, dict):
        seconds, micros = stamp.get("seconds"), stamp.get("microseconds")
        if isinstance(seconds, int) and isinstance(micros, int):
            with contextlib.suppress(OverflowError):  # JSON's numbers have no end
                return seconds + micros / 1e6
    raise QmpFailed("a command", "nonsense", "an event has no timestamp")


def field_of(value: Json, *path: str | int) -> Json:
    """Give what lies at a path of keys and numbers in a reply; None where the path ends before."""
    for key in path:
        if isinstance(value, dict) and isinstance(key, str):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
            value = value[key]
        else:
            return None
    return value
