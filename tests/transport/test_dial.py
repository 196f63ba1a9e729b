"""Who may talk to whom, said in plain words at both ends: real TLS over loopback."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import anyio
import anyio.abc
import pytest
from anyio.streams.tls import TLSStream

from tests.faults import Fuse, fused_stream_pair
from tests.transport.certificates import Authority, Files
from transport import dial
from transport.errors import (
    FrameTooLarge,
    PeerGone,
    PeerMisbehaved,
    TransportError,
    UntrustedPeer,
    VersionMismatch,
)
from transport.tls import Identity, Role, client_context, server_context

pytestmark = pytest.mark.anyio

HOST_A = Identity(role=Role.AGENT, name="host-a")
HOST_B = Identity(role=Role.AGENT, name="host-b")
EXPIRED = timedelta(days=-1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "fleet-ca")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"), "other-ca")


def client_of(files: Files) -> ssl.SSLContext:
    return client_context(files.certificate, files.key, files.ca)


def server_of(files: Files) -> ssl.SSLContext:
    return server_context(files.certificate, files.key, files.ca)


@dataclass
class Server:
    port: int
    welcomed: list[Identity] = field(default_factory=list)
    refusals: list[TransportError] = field(default_factory=list)
    refused: anyio.Event = field(default_factory=anyio.Event)


@asynccontextmanager
async def server(
    context: ssl.SSLContext, *, accepts: dial.Accepts = lambda identity: None
) -> AsyncIterator[Server]:
    async def echo(stream: TLSStream, identity: Identity) -> None:
        here.welcomed.append(identity)
        async with stream:
            await stream.send(await stream.receive())

    def on_refusal(remote: str, reason: TransportError) -> None:
        assert remote.startswith("127.0.0.1:")
        here.refusals.append(reason)
        here.refused.set()

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    here = Server(listener.extra(anyio.abc.SocketAttribute.local_port))
    async with listener, anyio.create_task_group() as tasks:

        async def run() -> None:
            await dial.serve(
                listener, lambda: context, echo, accepts=accepts, on_refusal=on_refusal, timeout_s=1
            )

        tasks.start_soon(run)
        yield here
        tasks.cancel_scope.cancel()


async def both_ends(
    server_files: Files,
    client_files: Files,
    *,
    expect: Identity | None = HOST_B,
    accepts: dial.Accepts = lambda identity: None,
) -> tuple[str, str]:
    """Connect, which must be refused; give what the client and the server said."""
    async with server(server_of(server_files), accepts=accepts) as here:
        with pytest.raises(UntrustedPeer) as caught:
            await dial.connect("127.0.0.1", here.port, client_of(client_files), expect, 5)
        with anyio.fail_after(5):
            await here.refused.wait()
    assert here.welcomed == []
    (refusal,) = here.refusals
    assert isinstance(refusal, UntrustedPeer)
    return str(caught.value), str(refusal)


async def test_two_agents_of_one_fleet_talk(ours: Authority) -> None:
    async with server(server_of(ours.issue(HOST_B.uri))) as here:
        stream = await dial.connect("127.0.0.1", here.port, client_of(ours.issue(HOST_A.uri)), HOST_B, 5)
        async with stream:
            assert dial.peer_identity(stream) == HOST_B
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
    assert here.welcomed == [HOST_A]
    assert here.refusals == []


async def test_a_client_that_expects_nobody_takes_whoever_is_of_the_fleet(ours: Authority) -> None:
    async with server(server_of(ours.issue(HOST_B.uri))) as here:
        stream = await dial.connect("127.0.0.1", here.port, client_of(ours.issue(HOST_A.uri)), None, 5)
        await stream.aclose()


async def test_an_expired_client_is_told_by_the_server_and_both_say_so(ours: Authority) -> None:
    client, there = await both_ends(ours.issue(HOST_B.uri), ours.issue(HOST_A.uri, valid_for=EXPIRED))
    assert "did not accept this side's certificate" in client
    assert "expired" in client
    assert "has expired" in there


async def test_an_expired_server_is_refused_by_the_client_and_hears_why(ours: Authority) -> None:
    client, there = await both_ends(ours.issue(HOST_B.uri, valid_for=EXPIRED), ours.issue(HOST_A.uri))
    assert "has expired" in client
    assert "expired" in there


async def test_a_client_of_another_ca_is_refused_at_both_ends(ours: Authority, others: Authority) -> None:
    stranger = others.issue(HOST_A.uri, trusts=ours.certificate)
    client, there = await both_ends(ours.issue(HOST_B.uri), stranger)
    assert "another CA" in client
    assert "another CA" in there


async def test_a_server_of_another_ca_is_refused_at_both_ends(ours: Authority, others: Authority) -> None:
    stranger = others.issue(HOST_B.uri, trusts=ours.certificate)
    client, there = await both_ends(stranger, ours.issue(HOST_A.uri))
    assert "another CA" in client
    assert "another CA" in there


async def test_a_wrong_host_is_refused_by_the_client_and_hears_why(ours: Authority) -> None:
    client, there = await both_ends(ours.issue("vmferry://agent/host-c"), ours.issue(HOST_A.uri))
    assert client == "expected agent/host-b, got agent/host-c"
    assert there == "the peer did not accept this side: expected agent/host-b, got agent/host-c"


@pytest.mark.parametrize(
    ("uris", "words"),
    [
        (("vmferry://janitor/host-a",), "unknown role 'janitor'"),
        ((), "no vmferry:// URI"),
        (("https://example.org/",), "no vmferry:// URI"),
        (("vmferry://agent/host-a", "vmferry://operator/eve"), "2 identities"),
        (("vmferry://agent/Host-A",), "names no identity"),
    ],
)
async def test_a_certificate_that_names_nobody_is_refused_at_both_ends(
    ours: Authority, uris: tuple[str, ...], words: str
) -> None:
    client, there = await both_ends(ours.issue(HOST_B.uri), ours.issue(*uris))
    assert words in there
    assert words in client


async def test_a_server_that_wants_somebody_else_says_so_at_both_ends(ours: Authority) -> None:
    def only_operators(identity: Identity) -> str | None:
        return None if identity.role is Role.OPERATOR else f"{identity} is no operator"

    client, there = await both_ends(ours.issue(HOST_B.uri), ours.issue(HOST_A.uri), accepts=only_operators)
    assert client == "the peer did not accept this side: agent/host-a is no operator"
    assert there == "agent/host-a is no operator"


async def test_a_client_without_a_certificate_is_refused(ours: Authority) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(ours.certificate)
    async with server(server_of(ours.issue(HOST_B.uri))) as here:
        with pytest.raises(UntrustedPeer, match="none was given"):
            await dial.connect("127.0.0.1", here.port, bare, HOST_B, 5)
        await here.refused.wait()
    assert "gave no certificate" in str(here.refusals[0])


async def test_nobody_there_is_a_peer_that_is_gone_and_nothing_has_left(ours: Authority) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(PeerGone, match="cannot reach") as caught:
            await dial.connect("127.0.0.1", port, client_of(ours.issue(HOST_A.uri)), HOST_B, 5)
    assert caught.value.may_have_reached_peer is False


async def test_a_server_that_says_nothing_is_given_up(ours: Authority) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(PeerGone, match="no answer"):
            await dial.connect(
                "127.0.0.1", mute.getsockname()[1], client_of(ours.issue(HOST_A.uri)), HOST_B, 0.05
            )


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"\x16\x03\x01\xff\xff" + b"x" * 99]
)
async def test_garbage_instead_of_tls_is_a_peer_that_misbehaves(ours: Authority, garbage: bytes) -> None:
    async with server(server_of(ours.issue(HOST_B.uri))) as here:
        stream = await anyio.connect_tcp("127.0.0.1", here.port)
        async with stream:
            await stream.send(garbage)
            await stream.send_eof()
            await here.refused.wait()
    assert isinstance(here.refusals[0], PeerMisbehaved | PeerGone)
    assert here.welcomed == []


async def greeted_with(ours: Authority, greeting: bytes) -> None:
    """Shake hands over memory with a server that sends `greeting` after TLS."""
    near, far = fused_stream_pair(Fuse())

    async def answer() -> None:
        tls = await dial._tls(far, server_of(ours.issue(HOST_B.uri)), server_side=True)
        await tls.send(greeting)
        await far.send_eof()

    def welcome(identity: Identity) -> None:
        return None

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(answer)
        try:
            await dial.handshake(near, client_of(ours.issue(HOST_A.uri)), server_side=False, accepts=welcome)
        finally:
            await far.aclose()


@pytest.mark.parametrize(
    ("greeting", "error"),
    [
        (struct.pack("!2sBBH", b"VF", 7, 9, 0), VersionMismatch),
        (struct.pack("!2sBBH", b"XX", 1, 1, 0), PeerMisbehaved),
        (struct.pack("!2sBBH", b"VF", 1, 1, 2049), FrameTooLarge),
        (struct.pack("!2sBBH", b"VF", 1, 1, 2) + b"\xff\xff", UntrustedPeer),
    ],
)
async def test_each_wrong_greeting_has_its_own_error(
    ours: Authority, greeting: bytes, error: type[Exception]
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await greeted_with(ours, greeting)
    assert caught.group_contains(error)


async def test_one_handshake_more_than_the_limit_is_closed_unheard(
    ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transport.limits.MAX_PENDING_HANDSHAKES", 1)
    async with (
        server(server_of(ours.issue(HOST_B.uri))) as here,
        await anyio.connect_tcp("127.0.0.1", here.port),
    ):
        with anyio.fail_after(5):
            async with await anyio.connect_tcp("127.0.0.1", here.port) as second:
                with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    await second.receive()
    assert "no more are taken" in str(here.refusals[0])
