"""Connections between agents: TCP, TLS 1.3, and a verdict of each side about the other.

After the TLS handshake each side sends one greeting, whether it accepts the peer or not:

```
 0       2        3        4        6
 +-------+--------+--------+--------+----------------+
 | "VF"  | oldest | newest | length | refusal, UTF-8 |     length 0: accepted
 +-------+--------+--------+--------+----------------+     oldest, newest: protocol versions spoken, u8
```

So a refusal is said at both ends, in the words of the side that refuses; versions are compared; and a client
learns in `connect` that the server has verified its certificate. With TLS 1.3 alone it would not: the client's
handshake returns before the server has looked, and the alert comes with the first read.

Tasks: `serve` runs one per connection in its own task group; it ends when it is cancelled.
Law: the only module with sockets of the control plane; nothing of a peer is parsed before its certificate is
verified, except by OpenSSL.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import anyio
import anyio.abc
from anyio.streams.tls import TLSAttribute, TLSStream

from transport import limits
from transport.errors import (
    FrameTooLarge,
    LocalMisuse,
    PeerGone,
    PeerMisbehaved,
    TransportError,
    UntrustedPeer,
    VersionMismatch,
)
from transport.sockets import prepare_socket
from transport.tls import Identity, identity_in, serial_in, tls_words

__all__ = [
    "PROTOCOL_VERSIONS",
    "Accepts",
    "accept",
    "connect",
    "handshake",
    "peer_identity",
    "peer_serial",
    "serve",
]

# Oldest and newest that this release speaks: N talks to N-1.
PROTOCOL_VERSIONS: Final = (1, 1)

_GREETING: Final = struct.Struct("!2sBBH")
_MAGIC: Final = b"VF"

# How long, and for how many reads of at most 64 KiB, a side that refuses waits for the peer to hang up.
_PARTING_S: Final = 0.5
_PARTING_READS: Final = 16

# Why a peer is refused, in a sentence that it will read, or None.
Accepts = Callable[[Identity], str | None]


async def connect(
    address: str,
    port: int,
    context: ssl.SSLContext,
    expect: Identity | None,
    timeout_s: float,
) -> TLSStream:
    """Reach an agent and prove each to the other; None expects whoever has a good certificate.

    Raises:
        UntrustedPeer: one side did not accept the other; the sentence says which and why.
        VersionMismatch: no common protocol.
        PeerGone: nobody there, or no handshake within `timeout_s`; nothing of a request has left.
        PeerMisbehaved: somebody there who does not speak this protocol.
    """
    where = f"{address}:{port}"
    try:
        with anyio.fail_after(timeout_s):
            try:
                stream = await anyio.connect_tcp(address, port)
            except OSError as exc:
                # Several addresses fail as a group in the cause; the first line of it is enough.
                raise PeerGone(f"cannot reach {where}: {exc}", may_have_reached_peer=False) from exc
            return await handshake(stream, context, server_side=False, accepts=_expects(expect))
    except TimeoutError as exc:
        raise PeerGone(f"no answer from {where} within {timeout_s:g} s", may_have_reached_peer=False) from exc


async def accept(
    stream: anyio.abc.ByteStream, context: ssl.SSLContext, *, accepts: Accepts, timeout_s: float
) -> tuple[TLSStream, Identity]:
    """Make a TCP connection that came in into a trusted one. The stream is closed when it does not become one.

    Raises:
        UntrustedPeer, VersionMismatch, PeerGone, PeerMisbehaved: as for `connect`.
    """
    try:
        with anyio.fail_after(timeout_s):
            secure = await handshake(stream, context, server_side=True, accepts=accepts)
    except TimeoutError as exc:
        await anyio.aclose_forcefully(stream)
        raise PeerGone(f"no handshake within {timeout_s:g} s", may_have_reached_peer=False) from exc
    return secure, peer_identity(secure)


async def serve(
    listener: anyio.abc.Listener[anyio.abc.SocketStream],
    context: Callable[[], ssl.SSLContext],
    session: Callable[[TLSStream, Identity], Awaitable[None]],
    *,
    accepts: Accepts,
    on_refusal: Callable[[str, TransportError], None],
    timeout_s: float = limits.HANDSHAKE_TIMEOUT_S,
) -> None:
    """Accept connections until cancelled, and run `session` for each peer that is trusted.

    `context` is asked with each connection, so that certificates can be replaced meanwhile.
    `session` owns the stream. `on_refusal` hears the remote address and the reason of every connection that
    was not accepted. More than `limits.MAX_PENDING_HANDSHAKES` at once are closed unheard.
    """
    pending = 0

    async def welcome(stream: anyio.abc.SocketStream) -> None:
        nonlocal pending
        remote = _remote(stream)
        if pending >= limits.MAX_PENDING_HANDSHAKES:
            await anyio.aclose_forcefully(stream)
            on_refusal(remote, PeerGone(f"{pending} handshakes are under way, no more are taken"))
            return
        pending += 1
        try:
            secure, identity = await accept(stream, context(), accepts=accepts, timeout_s=timeout_s)
        except TransportError as exc:
            on_refusal(remote, exc)
            return
        except Exception as exc:
            # A task's edge: what one handshake meets must not end the listener, and with it everything else.
            on_refusal(
                remote, LocalMisuse(f"the handshake failed inside this side: {type(exc).__name__}: {exc}")
            )
            return
        finally:
            pending -= 1
        await session(secure, identity)

    await listener.serve(welcome)


async def handshake(
    stream: anyio.abc.ByteStream, context: ssl.SSLContext, *, server_side: bool, accepts: Accepts
) -> TLSStream:
    """Do TLS and the greetings on a connected stream, which is closed when that fails.

    The caller sets the deadline. Raises as `connect`.
    """
    _prepare(stream)
    try:
        return await _trusted(stream, context, server_side=server_side, accepts=accepts)
    except TransportError:
        await _part(stream)
        raise
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


async def _trusted(
    stream: anyio.abc.ByteStream, context: ssl.SSLContext, *, server_side: bool, accepts: Accepts
) -> TLSStream:
    """TLS and greetings, with every failure said as one of ours."""
    try:
        secure = await _tls(stream, context, server_side=server_side)
        await _greet(secure, accepts)
        return secure
    except ssl.SSLError as exc:
        words = tls_words(exc)
        if words is not None:
            raise UntrustedPeer(words) from exc
        raise PeerMisbehaved(f"the TLS handshake failed: {exc}") from exc
    except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as exc:
        raise PeerGone("the peer hung up during the handshake", may_have_reached_peer=False) from exc


async def _part(stream: anyio.abc.ByteStream) -> None:
    """Close after a refusal, when the peer has had time to read it.

    Closing with unread bytes resets the connection, and the reset may overtake the refusal at the other end.
    """
    with (
        anyio.move_on_after(_PARTING_S),
        suppress(
            anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError, RuntimeError
        ),
    ):
        # RuntimeError is uvloop's word for a connection that the peer has closed already.
        await stream.send_eof()
        for _ in range(_PARTING_READS):
            await stream.receive()
    await anyio.aclose_forcefully(stream)


def peer_identity(stream: TLSStream) -> Identity:
    """Who is at the other end. Raises UntrustedPeer: its certificate names nobody, in plain words."""
    certificate: Mapping[str, Any] | None = stream.extra(TLSAttribute.peer_certificate, None)
    return identity_in(certificate)


def peer_serial(stream: TLSStream) -> str:
    """The serial number of the certificate at the other end, in hexadecimal."""
    return serial_in(stream.extra(TLSAttribute.peer_certificate, None))


async def _tls(stream: anyio.abc.ByteStream, context: ssl.SSLContext, *, server_side: bool) -> TLSStream:
    """Shake hands. Unlike TLSStream.wrap it also sends the alert of a handshake that failed on this side:
    without it the peer would only see the connection end, and could not say why."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=server_side)
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await _flush(outgoing, stream)
            try:
                incoming.write(await stream.receive())
            except anyio.EndOfStream:
                incoming.write_eof()
        except ssl.SSLError as exc:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
                await _flush(outgoing, stream)
            if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                raise anyio.EndOfStream from exc
            raise
        else:
            await _flush(outgoing, stream)
            # Our messages carry their length, so that a connection that is cut is seen without TLS's own farewell.
            return TLSStream(
                transport_stream=stream,
                standard_compatible=False,
                _ssl_object=tls,
                _read_bio=incoming,
                _write_bio=outgoing,
            )


async def _flush(outgoing: ssl.MemoryBIO, stream: anyio.abc.ByteStream) -> None:
    if outgoing.pending:
        await stream.send(outgoing.read())


async def _greet(secure: TLSStream, accepts: Accepts) -> None:
    """Tell the peer the verdict about it, and hear its own."""
    refusal: str | None
    try:
        refusal = accepts(peer_identity(secure))
    except UntrustedPeer as exc:
        refusal = str(exc)
    words = (refusal or "").encode()[: limits.MAX_REFUSAL_TEXT_BYTES]
    with suppress(anyio.BrokenResourceError, OSError):
        # A peer that refuses may be gone already; its greeting is still there to be read.
        await secure.send(_GREETING.pack(_MAGIC, *PROTOCOL_VERSIONS, len(words)) + words)
    magic, oldest, newest, length = _GREETING.unpack(await _exactly(secure, _GREETING.size))
    if magic != _MAGIC:
        raise PeerMisbehaved("the peer speaks TLS but not this protocol")
    if length > limits.MAX_REFUSAL_TEXT_BYTES:
        raise FrameTooLarge(length, limits.MAX_REFUSAL_TEXT_BYTES)
    their_words = (await _exactly(secure, length)).decode("utf-8", "replace")
    if refusal is not None:
        raise UntrustedPeer(refusal)
    if their_words:
        raise UntrustedPeer(f"the peer did not accept this side: {their_words}")
    if min(newest, PROTOCOL_VERSIONS[1]) < max(oldest, PROTOCOL_VERSIONS[0]):
        raise VersionMismatch(PROTOCOL_VERSIONS, (oldest, newest))


async def _exactly(stream: TLSStream, wanted_bytes: int) -> bytes:
    data = b""
    while len(data) < wanted_bytes:
        data += await stream.receive(wanted_bytes - len(data))
    return data


def _expects(expect: Identity | None) -> Accepts:
    def judge(identity: Identity) -> str | None:
        if expect is None or identity == expect:
            return None
        return f"expected {expect}, got {identity}"

    return judge


def _prepare(stream: anyio.abc.ByteStream) -> None:
    raw = stream.extra(anyio.abc.SocketAttribute.raw_socket, None)
    if isinstance(raw, socket.socket):
        prepare_socket(raw)


def _remote(stream: anyio.abc.SocketStream) -> str:
    remote = stream.extra(anyio.abc.SocketAttribute.remote_address, None)
    if isinstance(remote, tuple):
        return f"{remote[0]}:{remote[1]}"
    return "unknown"
