"""The control socket of a guest's process: what is said over it, and both ends of saying it.

Law: blocking calls on unix sockets, for threads. Whoever can open the socket (mode 0600 in a directory 0700) may do
everything to the guest; garbage still only ends its own connection.

    message = u32 length, little endian | msgpack of `length` bytes
    request = [verb, argument bytes]
    reply   = [true, {name: value}] with file descriptors on its first byte, or [false, sentence]

One request at a time on a connection, answered before the next is read.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgpack

from agents.hypervisors.embedded.errors import GuestGone, MessageInvalid, RequestRefused
from agents.hypervisors.embedded.spec import MAX_STATE_BYTES

__all__ = [
    "MAX_CLIENTS",
    "MAX_REPLY_BYTES",
    "MAX_REQUEST_BYTES",
    "Answer",
    "Body",
    "ControlClient",
    "ControlServer",
    "Verb",
]

# The largest argument is a device state.
MAX_REQUEST_BYTES: Final = MAX_STATE_BYTES + 64
# The largest reply is a dirty bitmap of the largest guest: 64 GiB / 4 KiB / 8 = 2 MiB.
MAX_REPLY_BYTES: Final = (2 << 20) + 4096
# An agent holds one connection per migration and opens one for each listing; each costs a thread here.
MAX_CLIENTS: Final = 16
MAX_FDS: Final = 2
# A message that has begun arrives at once between two processes of one host.
_MESSAGE_TIMEOUT_S: Final = 10.0
_LENGTH: Final = struct.Struct("<I")
_FD: Final = struct.Struct("i")

Body = dict[str, object]


class Verb(StrEnum):
    """What can be asked of a guest's process."""

    DESCRIBE = "describe"
    RAM = "ram"
    TRACK = "track"
    HOOK_START = "hook_start"
    HOOK_HARVEST = "hook_harvest"
    HOOK_STOP = "hook_stop"
    PAUSE = "pause"
    RESUME = "resume"
    SAVE_STATE = "save_state"
    LOAD_STATE = "load_state"
    FINGERPRINT = "fingerprint"
    HOLD = "hold"
    QUIT = "quit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a request gives. `fds_to_close` are sent and then closed, `fds` are sent and stay open."""

    body: Body
    fds: tuple[int, ...] = ()
    fds_to_close: tuple[int, ...] = ()


class ControlClient:
    """The asking end. Threads may share it: one request at a time goes over it. Any failure but a refusal ends it."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Connect.

        Raises:
            GuestGone: the world's: nobody listens there.
        """
        self._lock = threading.Lock()
        self._timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(path))
        except OSError as exc:
            self._socket.close()
            raise GuestGone(f"no guest answers at {path}: {exc.strerror or exc}") from exc

    def peer_pid(self) -> int:
        """Give the process at the other end, as the kernel knows it. Raises OSError when it is closed."""
        pid: int
        pid, _, _ = struct.unpack("iII", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid

    def request(self, verb: Verb, argument: bytes = b"") -> tuple[Body, list[int]]:
        """Ask and wait; give the reply and the file descriptors that came with it, which the caller owns.

        Raises:
            RequestRefused: the guest's process says no.
            GuestGone: the world's: it ended or did not answer in time. The connection is closed.
            MessageInvalid: theirs: the answer is no reply. The connection is closed.
        """
        with self._lock:
            fds: list[int] = []
            try:
                _send(self._socket, [str(verb), argument])
                self._socket.settimeout(self._timeout_s)
                reply = _receive(self._socket, MAX_REPLY_BYTES, fds)
                return _checked_reply(reply), fds
            except BaseException as exc:
                for fd in fds:
                    os.close(fd)
                if isinstance(exc, RequestRefused):
                    raise
                self._socket.close()
                if isinstance(exc, TimeoutError):
                    raise GuestGone(
                        f"the guest's process did not answer {verb} in {self._timeout_s:g} s"
                    ) from exc
                if isinstance(exc, OSError | EOFError):
                    raise GuestGone(f"the guest's process ended during {verb}") from exc
                raise

    def close(self) -> None:
        """May be called twice; not while a request is under way in another thread."""
        self._socket.close()


class ControlServer:
    """The answering end: one thread that accepts, and one for each of at most MAX_CLIENTS connections.

    All threads are daemons: they end with the process, which is the only way this server ends.

    Args:
        listener: bound and listening; owned from here on.
        answer: called with (verb, argument, connection number) from the connections' threads. It raises
            RequestRefused to refuse.
        closed: called with the connection number after a connection ended.
    """

    def __init__(
        self,
        listener: socket.socket,
        answer: Callable[[Verb, bytes, int], Answer],
        closed: Callable[[int], None],
    ) -> None:
        self._listener = listener
        self._answer = answer
        self._closed = closed
        self._free = threading.Semaphore(MAX_CLIENTS)
        self._connections = 0

    def start(self) -> None:
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except ConnectionError:
                continue
            except OSError:  # the listener was closed
                return
            if not self._free.acquire(blocking=False):
                connection.close()
                continue
            self._connections += 1
            threading.Thread(target=self._serve, args=(connection, self._connections), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            with connection, contextlib.suppress(OSError, EOFError, MessageInvalid):
                while True:
                    verb, argument = _checked_request(_receive(connection, MAX_REQUEST_BYTES, None))
                    self._reply(connection, verb, argument, number)
        finally:
            self._free.release()
            self._closed(number)

    def _reply(self, connection: socket.socket, verb: Verb, argument: bytes, number: int) -> None:
        try:
            answer = self._answer(verb, argument, number)
        except RequestRefused as exc:
            _send(connection, [False, str(exc)])
            return
        try:
            _send(connection, [True, answer.body], answer.fds + answer.fds_to_close)
        finally:
            for fd in answer.fds_to_close:
                os.close(fd)


def _send(connection: socket.socket, message: list[object], fds: tuple[int, ...] = ()) -> None:
    body: bytes = msgpack.packb(message)
    wire = _LENGTH.pack(len(body)) + body
    connection.settimeout(_MESSAGE_TIMEOUT_S)
    if fds:
        sent = socket.send_fds(connection, [wire], fds)
        wire = wire[sent:]
    connection.sendall(wire)


def _receive(connection: socket.socket, max_bytes: int, fds: list[int] | None) -> object:
    """Read one message. With `fds` (the asking end) there is a deadline, and descriptors are added to it."""
    if fds is None:
        connection.settimeout(None)  # an agent asks when it wants to
        head = connection.recv(_LENGTH.size)
    else:
        head = _receive_with_fds(connection, fds)
    connection.settimeout(_MESSAGE_TIMEOUT_S)
    if not head:
        raise EOFError
    head += _receive_exactly(connection, _LENGTH.size - len(head))
    (length,) = _LENGTH.unpack(head)
    if length > max_bytes:
        raise MessageInvalid(f"a control message of {length} bytes; {max_bytes} are the most")
    try:
        return msgpack.unpackb(_receive_exactly(connection, length))
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as exc:
        raise MessageInvalid(f"a control message is not msgpack ({type(exc).__name__})") from exc


def _receive_with_fds(connection: socket.socket, fds: list[int]) -> bytes:
    """Not `socket.recv_fds`, which drops its flags: the descriptors must not leak into programs that we start."""
    space = socket.CMSG_SPACE(MAX_FDS * _FD.size)
    head, messages, _, _ = connection.recvmsg(_LENGTH.size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = content[: len(content) // _FD.size * _FD.size]
            fds.extend(fd for (fd,) in _FD.iter_unpack(whole))
    return head


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    wire = bytearray(length)
    view = memoryview(wire)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(wire)


def _checked_request(message: object) -> tuple[Verb, bytes]:
    match message:
        case [str(verb), bytes(argument)] if verb in tuple(Verb):
            return Verb(verb), argument
        case _:
            raise MessageInvalid("a control message is no request")


def _checked_reply(message: object) -> Body:
    match message:
        case [True, dict(body)] if all(isinstance(key, str) for key in body):
            return body
        case [False, str(sentence)]:
            raise RequestRefused(sentence)
        case _:
            raise MessageInvalid("a control message is no reply")
