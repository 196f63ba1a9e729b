"""How a data connection proves that it belongs to a migration, before anything else on it is parsed.

```
 client (source)                                   server (destination)
        <---------------- challenge: 16 random bytes
   hello: 72 bytes ---------------->
      magic "VMFD" | version u8 | 0 u8 | slot u16 | session id 16 | nonce 16
      | HMAC-SHA256(hello key, "client" | challenge | everything before the tag)
        <---------------- proof: HMAC-SHA256(hello key, "server" | challenge | everything of the hello)
```

Both tags cover both sides' random bytes, so that neither can be replayed, and have different labels, so that
neither can be reflected. The hello key is in nobody's hands but those of the two agents of one migration.

Law: blocking, for worker threads; fixed sizes; every wait within one deadline. A server tells nobody which part
was wrong: an unknown session costs the same HMAC as a wrong tag and ends the same way.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from transport import limits
from transport.errors import LocalMisuse, PeerGone, PeerMisbehaved

__all__ = ["CHALLENGE_BYTES", "HELLO_BYTES", "PROOF_BYTES", "Hello", "answer_hello", "say_hello"]

VERSION: Final = 1
SESSION_ID_BYTES: Final = 16
CHALLENGE_BYTES: Final = 16
PROOF_BYTES: Final = 32

_MAGIC: Final = b"VMFD"
_FIELDS: Final = struct.Struct("!4sBxH16s16s")
HELLO_BYTES: Final = _FIELDS.size + PROOF_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Which connection of which migration a peer has proved to be."""

    session_id: bytes
    slot: int


def say_hello(
    sock: socket.socket,
    session_id: bytes,
    slot: int,
    hello_key: bytes,
    *,
    timeout_s: float = limits.HANDSHAKE_TIMEOUT_S,
) -> None:
    """Prove to a server that this is connection `slot`, and that the server knows the key, too.

    The socket is blocking without a timeout afterwards; after an error it must be closed.

    Raises:
        PeerGone: the server hung up, which is also how it refuses, or took longer than `timeout_s`.
        PeerMisbehaved: the server does not know the key.
    """
    if len(session_id) != SESSION_ID_BYTES or not 0 <= slot < limits.MAX_CONNECTIONS:
        raise LocalMisuse(f"no such data connection: slot {slot}, a session id of {len(session_id)} bytes")
    with _Deadline(sock, timeout_s) as wire:
        challenge = wire.receive(CHALLENGE_BYTES)
        fields = _FIELDS.pack(_MAGIC, VERSION, slot, session_id, os.urandom(16))
        hello = fields + client_tag(hello_key, challenge, fields)
        wire.send(hello)
        if not hmac.compare_digest(wire.receive(PROOF_BYTES), server_proof(hello_key, challenge, hello)):
            raise PeerMisbehaved("the other end of a data connection does not know the migration's key")


def answer_hello(
    sock: socket.socket,
    hello_key_of: Callable[[bytes], bytes | None],
    *,
    timeout_s: float = limits.HANDSHAKE_TIMEOUT_S,
) -> Hello:
    """Let a client prove which migration it belongs to; `hello_key_of` gives the key of a session id.

    The socket is blocking without a timeout afterwards; after an error it must be closed.

    Raises:
        PeerMisbehaved: not a hello, or not one with a key of this agent; the peer is not told which.
        PeerGone: the client hung up, or took longer than `timeout_s`.
    """
    with _Deadline(sock, timeout_s) as wire:
        challenge = os.urandom(CHALLENGE_BYTES)
        wire.send(challenge)
        hello = wire.receive(HELLO_BYTES)
        fields, tag = hello[: _FIELDS.size], hello[_FIELDS.size :]
        magic, version, slot, session_id, _ = _FIELDS.unpack(fields)
        hello_key = hello_key_of(session_id)
        # A key that nobody has stands in for an unknown session.
        expected = client_tag(hello_key or os.urandom(32), challenge, fields)
        is_proved = hmac.compare_digest(tag, expected) and hello_key is not None
        is_sound = magic == _MAGIC and version == VERSION and slot < limits.MAX_CONNECTIONS and fields[5] == 0
        if hello_key is None or not is_proved or not is_sound:
            raise PeerMisbehaved("a data connection did not prove that it belongs to a migration here")
        wire.send(server_proof(hello_key, challenge, hello))
        return Hello(session_id=session_id, slot=slot)


def client_tag(hello_key: bytes, challenge: bytes, fields: bytes) -> bytes:
    """The tag at the end of a hello."""
    return hmac.digest(hello_key, b"client" + challenge + fields, "sha256")


def server_proof(hello_key: bytes, challenge: bytes, hello: bytes) -> bytes:
    """The server's answer to a hello."""
    return hmac.digest(hello_key, b"server" + challenge + hello, "sha256")


class _Deadline:
    """A socket whose reads and writes together must end within a time."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._ends_at_s = time.monotonic() + timeout_s

    def __enter__(self) -> _Deadline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sock.settimeout(None)

    def send(self, data: bytes) -> None:
        try:
            self._arm()
            self._sock.sendall(data)
        except OSError as exc:
            raise PeerGone(f"a data connection broke in its handshake: {exc}") from exc

    def receive(self, wanted_bytes: int) -> bytes:
        data = b""
        while len(data) < wanted_bytes:
            try:
                self._arm()
                piece = self._sock.recv(wanted_bytes - len(data))
            except OSError as exc:
                raise PeerGone(f"a data connection broke in its handshake: {exc}") from exc
            if not piece:
                raise PeerGone("the other end closed a data connection in its handshake")
            data += piece
        return data

    def _arm(self) -> None:
        left_s = self._ends_at_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"it took longer than {self._timeout_s:g} s")
        self._sock.settimeout(left_s)
