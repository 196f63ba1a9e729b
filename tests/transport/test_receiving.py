"""What one connection may do to the destination: apply records once, or die alone."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import limits
from transport.courier import ACK_BYTES
from transport.errors import BadSeal, FrameTooLarge, LocalMisuse, PeerGone, PeerMisbehaved, TransportError
from transport.frames import HEADER_BYTES, TAG_BYTES, Header, Kind, pack_header, parse_header
from transport.receiving import Consumer, ReceiveBundle
from transport.seal import Keys, Opener, Sealer

KEYS = Keys(b"k" * 32)
PAYLOAD_BYTES = 1000


def record(seq: int, payload: bytes = b"payload", keys: Keys = KEYS) -> bytes:
    """Seal with a fresh sealer: tests may use a seq twice, as a resend does."""
    header = pack_header(Header(kind=Kind.DATA, slot=0, payload_bytes=len(payload), seq=seq))
    out = bytearray(len(payload) + TAG_BYTES)
    Sealer(keys, Kind.DATA).seal_into(seq, header, payload, memoryview(out))
    return header + bytes(out)


def bundle(consumer: Consumer = lambda payload: None) -> ReceiveBundle:
    return ReceiveBundle(keys=KEYS, consumer=consumer, window_bytes=4096, max_payload_bytes=PAYLOAD_BYTES)


def acked(sock: socket.socket) -> int:
    """Read one acknowledgement and give the seq of the record."""
    data = sock.recv(ACK_BYTES, socket.MSG_WAITALL)
    header = parse_header(data[:HEADER_BYTES], expect=Kind.ACK, max_payload_bytes=8)
    body = bytearray(8)
    Opener(KEYS, Kind.ACK).open_into(header.seq, data[:HEADER_BYTES], data[HEADER_BYTES:], memoryview(body))
    return int.from_bytes(body, "big")


class Connection:
    """One connection that a bundle serves in a thread."""

    def __init__(self, served_by: ReceiveBundle) -> None:
        self.sock, theirs = socket.socketpair()
        self.error: TransportError | None = None

        def serve() -> None:
            try:
                served_by.serve(theirs)
            except TransportError as exc:
                self.error = exc

        self._thread = threading.Thread(target=serve)
        self._thread.start()

    def ended(self) -> TransportError | None:
        """Wait for the end that the bundle or the test has caused."""
        self._thread.join(5)
        assert not self._thread.is_alive()
        return self.error


@contextmanager
def connected(to: ReceiveBundle, count: int = 1) -> Iterator[list[Connection]]:
    connections = [Connection(to) for _ in range(count)]
    try:
        yield connections
    finally:
        to.close()
        for connection in connections:
            connection.ended()
            connection.sock.close()


def test_a_record_is_applied_and_acknowledged() -> None:
    payloads: list[bytes] = []
    receiver = bundle(lambda payload: payloads.append(bytes(payload)))
    with connected(receiver) as (connection,):
        connection.sock.sendall(record(0, b"zero") + record(1, b"one"))
        assert [acked(connection.sock), acked(connection.sock)] == [0, 1]
        connection.sock.shutdown(socket.SHUT_WR)
        assert connection.ended() is None
    assert payloads == [b"zero", b"one"]
    assert receiver.records == 2
    assert receiver.received_bytes == len(record(0, b"zero") + record(1, b"one"))


def test_a_copy_that_lingered_in_a_dead_connection_is_acknowledged_and_not_applied() -> None:
    page = bytearray()

    def apply(payload: memoryview) -> None:
        page[:] = payload

    receiver = bundle(apply)
    with connected(receiver, 2) as (dead, fresh):
        fresh.sock.sendall(record(0, b"old"))
        assert acked(fresh.sock) == 0
        fresh.sock.sendall(record(1, b"new"))
        assert acked(fresh.sock) == 1
        dead.sock.sendall(record(0, b"old"))
        assert acked(dead.sock) == 0
    assert page == b"new"
    assert receiver.duplicates == 1


def test_a_copy_of_a_record_that_is_being_applied_is_acknowledged_when_it_is_applied() -> None:
    has_begun, may_end = threading.Event(), threading.Event()
    calls: list[int] = []

    def slow(payload: memoryview) -> None:
        calls.append(1)
        has_begun.set()
        may_end.wait(5)

    receiver = bundle(slow)
    with connected(receiver, 2) as (first, second):
        first.sock.sendall(record(0))
        assert has_begun.wait(5)
        second.sock.sendall(record(0))
        second.sock.settimeout(0.02)
        with pytest.raises(TimeoutError):
            second.sock.recv(1)
        second.sock.settimeout(5)
        may_end.set()
        assert acked(second.sock) == 0
        assert acked(first.sock) == 0
    assert calls == [1]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", PeerMisbehaved),
        (record(0)[:-1] + b"\x00", BadSeal),
        (record(0, keys=Keys(b"x" * 32)), BadSeal),
        (record(0, bytes(PAYLOAD_BYTES + 1)), FrameTooLarge),
        (record(limits.span_records(4096)), PeerMisbehaved),
        (record(0)[:10], PeerGone),
        (record(0)[:20], PeerGone),
    ],
)
def test_each_wrong_record_ends_its_connection_and_no_other(data: bytes, error: type[Exception]) -> None:
    receiver = bundle()
    with connected(receiver, 2) as (bad, good):
        bad.sock.sendall(data)
        bad.sock.shutdown(socket.SHUT_WR)
        assert type(bad.ended()) is error
        good.sock.sendall(record(0))
        assert acked(good.sock) == 0
    assert receiver.failure is None
    assert receiver.records == 1


def test_a_payload_at_the_limit_is_taken() -> None:
    with connected(bundle()) as (connection,):
        connection.sock.sendall(record(0, bytes(PAYLOAD_BYTES)))
        assert acked(connection.sock) == 0


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.booleans())
def test_garbage_raises_only_errors_of_the_peer_and_is_never_consumed(garbage: bytes, follows: bool) -> None:
    consumed: list[bytes] = []
    receiver = bundle(lambda payload: consumed.append(bytes(payload)))
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall((record(0) if follows else b"") + garbage)
        ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(PeerMisbehaved, PeerGone):
            receiver.serve(theirs)
    assert consumed == ([b"payload"] if follows else [])


def test_an_error_of_the_consumer_ends_all_connections_and_is_kept() -> None:
    def fail(payload: memoryview) -> None:
        raise OSError(28, "no space left on device")

    receiver = bundle(fail)
    with connected(receiver, 2) as (first, second):
        first.sock.sendall(record(0))
        assert first.ended() is None
        assert second.ended() is None
        assert first.sock.recv(1) == b""
    assert isinstance(receiver.failure, OSError)
    assert receiver.records == 0


def test_a_closed_bundle_serves_nobody() -> None:
    receiver = bundle()
    receiver.close()
    ours, theirs = socket.socketpair()
    with ours:
        receiver.serve(theirs)
        assert ours.recv(1) == b""


def test_one_connection_more_than_the_limit_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 1)
    receiver = bundle()
    with connected(receiver) as (first,):
        first.sock.sendall(record(0))
        acked(first.sock)
        ours, theirs = socket.socketpair()
        with ours:
            receiver.serve(theirs)
            assert ours.recv(1) == b""


@pytest.mark.parametrize("max_payload_bytes", [0, limits.MAX_PAYLOAD_BYTES + 1])
def test_a_payload_has_its_limits(max_payload_bytes: int) -> None:
    with pytest.raises(LocalMisuse):
        ReceiveBundle(keys=KEYS, consumer=lambda payload: None, max_payload_bytes=max_payload_bytes)


async def ends_soon(end: Callable[[ReceiveBundle, anyio.CancelScope], None]) -> None:
    """Serve a connection in a task until `end` has ended it."""
    receiver = bundle()
    ours, theirs = socket.socketpair()
    with ours, anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:

            async def serve() -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await receiver.serve_connection(theirs)

            scopes: list[anyio.CancelScope] = []
            tasks.start_soon(serve)
            ours.sendall(record(0))
            await anyio.to_thread.run_sync(acked, ours)
            end(receiver, scopes[0])
        await receiver.aclose()
        assert await anyio.to_thread.run_sync(ours.recv, 1) == b""


@pytest.mark.anyio
async def test_a_cancelled_connection_ends_with_its_thread() -> None:
    await ends_soon(lambda receiver, scope: scope.cancel())


@pytest.mark.anyio
async def test_closing_the_bundle_ends_its_connections() -> None:
    await ends_soon(lambda receiver, scope: receiver.close())


@pytest.mark.anyio
async def test_after_aclose_the_consumer_is_called_no_more() -> None:
    has_begun, may_end = threading.Event(), threading.Event()
    done: list[int] = []

    def slow(payload: memoryview) -> None:
        has_begun.set()
        may_end.wait(5)
        done.append(1)

    receiver = bundle(slow)
    with connected(receiver) as (connection,):
        connection.sock.sendall(record(0) + record(1))
        await anyio.to_thread.run_sync(has_begun.wait, 5)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receiver.aclose)
            await anyio.wait_all_tasks_blocked()
            may_end.set()
        assert done == [1]
        await receiver.aclose()
    assert done == [1]


def test_a_bundle_with_a_limit_takes_exactly_so_many_bytes_repeats_included() -> None:
    size = len(record(0))
    receiver = ReceiveBundle(
        keys=KEYS, consumer=lambda payload: None, max_payload_bytes=PAYLOAD_BYTES, limit_bytes=2 * size
    )
    with connected(receiver) as (first,):
        for _ in range(2):
            first.sock.sendall(record(0))
            acked(first.sock)
        assert receiver.records == 1
        first.sock.sendall(record(0))
        assert first.ended() is None
        assert first.sock.recv(1) == b""
    assert isinstance(receiver.failure, PeerMisbehaved)


def test_a_bundle_may_have_a_smaller_limit_of_connections() -> None:
    receiver = ReceiveBundle(keys=KEYS, consumer=lambda payload: None, max_connections=1)
    with connected(receiver) as (first,):
        first.sock.sendall(record(0))
        acked(first.sock)
        ours, theirs = socket.socketpair()
        with ours:
            receiver.serve(theirs)
            assert ours.recv(1) == b""


@pytest.mark.anyio
async def test_a_connection_more_than_are_served_is_closed_and_waits_for_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 1)
    both = bundle()
    first, its = socket.socketpair()
    second, other = socket.socketpair()
    with first, second:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(both.serve_connection, its)
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(5):
                await both.serve_connection(other)
            assert other.fileno() == -1
            assert second.recv(1) == b""
            # The one that was there is served as before.
            first.sendall(record(0))
            assert await anyio.to_thread.run_sync(acked, first) == 0
            first.shutdown(socket.SHUT_RDWR)
        await both.aclose()


@contextmanager
def over_tcp(to: ReceiveBundle) -> Iterator[tuple[socket.socket, list[int]]]:
    """Serve one TCP connection; the list gets how often its thread had waited when it ended."""
    waits: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()

    def serve() -> None:
        to.serve(theirs)
        waits.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield sock, waits
        sock.shutdown(socket.SHUT_WR)
        thread.join(5)
        assert not thread.is_alive()
    finally:
        to.close()
        thread.join()
        sock.close()


def test_a_thread_sleeps_through_the_segments_of_a_record() -> None:
    big = ReceiveBundle(keys=KEYS, consumer=lambda payload: None)
    sealed = record(0, bytes(900_000))
    segments = [sealed[at : at + 4096] for at in range(0, len(sealed), 4096)]
    with over_tcp(big) as (sock, waits):
        for segment in segments:
            sock.sendall(segment)
            threading.Event().wait(0.0002)
        assert acked(sock) == 0
    assert big.records == 1
    # Four for the bytes, one for the header, and some for locks.
    assert waits[0] < len(segments) / 8


@pytest.mark.parametrize("piece", [1, 7, HEADER_BYTES, HEADER_BYTES + 1, 999])
def test_no_byte_of_a_record_is_waited_for_in_vain(piece: int) -> None:
    """In pieces of any size, and with nothing after the last one: each record is acknowledged."""
    receiver = bundle()
    with over_tcp(receiver) as (sock, _):
        for seq, size in enumerate((1, 500, PAYLOAD_BYTES)):
            sealed = record(seq, bytes(size))
            for at in range(0, len(sealed), piece):
                sock.sendall(sealed[at : at + piece])
            assert acked(sock) == seq
    assert receiver.records == 3
