from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.hypervisors.embedded.control import (
    MAX_CLIENTS,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    Answer,
    ControlClient,
    ControlServer,
    Verb,
)
from agents.hypervisors.embedded.errors import GuestGone, MessageInvalid, RequestRefused

TIMEOUT_S = 5.0


class FakeGuest:
    """Answers with the argument; refuses `quit`; gives a pipe for `ram`; and counts who left."""

    def __init__(self) -> None:
        self.left = threading.Semaphore(0)
        self.calls: list[tuple[Verb, bytes]] = []

    def answer(self, verb: Verb, argument: bytes, _connection: int) -> Answer:
        self.calls.append((verb, argument))
        if verb is Verb.QUIT:
            raise RequestRefused("it will not end")
        if verb is Verb.RAM:
            read_end, write_end = os.pipe()
            os.write(write_end, b"through the pipe")
            os.close(write_end)
            return Answer(body={}, fds_to_close=(read_end,))
        return Answer(body={"echo": argument})

    def closed(self, _connection: int) -> None:
        self.left.release()


@pytest.fixture
def guest(run_dir: Path) -> Iterator[tuple[FakeGuest, Path]]:
    fake = FakeGuest()
    path = run_dir / "s"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(2 * MAX_CLIENTS)
    server = ControlServer(listener, fake.answer, fake.closed)
    server.start()
    yield fake, path
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def raw(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    connection.connect(str(path))
    return connection


def frame(message: object) -> bytes:
    body: bytes = msgpack.packb(message)
    return struct.pack("<I", len(body)) + body


def test_a_request_is_answered(guest: tuple[FakeGuest, Path]) -> None:
    with closing(ControlClient(guest[1], timeout_s=TIMEOUT_S)) as client:
        assert client.request(Verb.LOAD_STATE, b"argument") == ({"echo": b"argument"}, [])
        assert client.peer_pid() == os.getpid()


def test_a_refusal_leaves_the_connection_usable(guest: tuple[FakeGuest, Path]) -> None:
    with closing(ControlClient(guest[1], timeout_s=TIMEOUT_S)) as client:
        with pytest.raises(RequestRefused, match="it will not end"):
            client.request(Verb.QUIT)
        assert client.request(Verb.PAUSE) == ({"echo": b""}, [])


def test_a_file_descriptor_arrives(guest: tuple[FakeGuest, Path]) -> None:
    with closing(ControlClient(guest[1], timeout_s=TIMEOUT_S)) as client:
        _, (fd,) = client.request(Verb.RAM)
        assert not os.get_inheritable(fd)
        with open(fd, "rb") as pipe:
            assert pipe.read() == b"through the pipe"


def test_threads_share_a_connection(guest: tuple[FakeGuest, Path]) -> None:
    with closing(ControlClient(guest[1], timeout_s=TIMEOUT_S)) as client:
        answers: dict[int, object] = {}

        def ask(number: int) -> None:
            for _ in range(20):
                answers[number] = client.request(Verb.PAUSE, bytes([number]))[0]["echo"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {number: bytes([number]) for number in range(4)}


def test_the_longest_request_is_taken_and_one_byte_more_is_not(guest: tuple[FakeGuest, Path]) -> None:
    overhead = len(msgpack.packb([str(Verb.PAUSE), bytes(MAX_REQUEST_BYTES - 100)])) - (
        MAX_REQUEST_BYTES - 100
    )
    with closing(ControlClient(guest[1], timeout_s=TIMEOUT_S)) as client:
        body, _ = client.request(Verb.PAUSE, bytes(MAX_REQUEST_BYTES - overhead))
        assert body["echo"] == bytes(MAX_REQUEST_BYTES - overhead)
        with pytest.raises(GuestGone):
            client.request(Verb.PAUSE, bytes(MAX_REQUEST_BYTES - overhead + 1))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=1, max_size=64))
def test_garbage_ends_its_own_connection_only(guest: tuple[FakeGuest, Path], garbage: bytes) -> None:
    fake, path = guest
    calls = len(fake.calls)
    with raw(path) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert len(fake.calls) == calls
    with closing(ControlClient(path, timeout_s=TIMEOUT_S)) as client:
        client.request(Verb.DESCRIBE)


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {},
        ["describe"],
        ["describe", "text"],
        ["describe", b"", 1],
        ["format_disk", b""],
        [b"describe", b""],
    ],
)
def test_what_is_no_request_ends_the_connection(guest: tuple[FakeGuest, Path], message: object) -> None:
    fake, path = guest
    with raw(path) as connection:
        connection.sendall(frame(message))
        assert connection.recv(1) == b""
    assert fake.calls == []


def test_more_clients_than_the_limit_are_turned_away_until_one_leaves(guest: tuple[FakeGuest, Path]) -> None:
    fake, path = guest
    clients = [ControlClient(path, timeout_s=TIMEOUT_S) for _ in range(MAX_CLIENTS)]
    for client in clients:
        client.request(Verb.PAUSE)
    with closing(ControlClient(path, timeout_s=TIMEOUT_S)) as one_more, pytest.raises(GuestGone):
        one_more.request(Verb.PAUSE)
    clients[0].close()
    assert fake.left.acquire(timeout=TIMEOUT_S)
    with closing(ControlClient(path, timeout_s=TIMEOUT_S)) as client:
        client.request(Verb.PAUSE)
    for client in clients:
        client.close()


def answering(path: Path, reply: bytes) -> Callable[[], None]:
    """Listen on `path` and answer the first request with these bytes; give a function that waits for the end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1024)
            connection.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread.join


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", GuestGone),
        (b"\1\0", GuestGone),
        (struct.pack("<I", 9) + b"short", GuestGone),
        (struct.pack("<I", MAX_REPLY_BYTES + 1), MessageInvalid),
        (struct.pack("<I", 1) + b"\xc1", MessageInvalid),
        (frame([True, 5]), MessageInvalid),
        (frame([True, {1: 2}]), MessageInvalid),
        (frame([False, 5]), MessageInvalid),
        (frame([1, {}]), MessageInvalid),
        (frame("yes"), MessageInvalid),
    ],
)
def test_an_answer_that_is_none_ends_the_connection(
    run_dir: Path, reply: bytes, error: type[Exception]
) -> None:
    join = answering(run_dir / "s", reply)
    client = ControlClient(run_dir / "s", timeout_s=TIMEOUT_S)
    with pytest.raises(error):
        client.request(Verb.DESCRIBE)
    with pytest.raises(GuestGone):
        client.request(Verb.DESCRIBE)
    join()


def test_a_guest_that_does_not_answer_is_given_up(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run_dir / "s"))
        listener.listen(1)
        client = ControlClient(run_dir / "s", timeout_s=0.01)
        with pytest.raises(GuestGone, match=r"did not answer pause in 0\.01 s"):
            client.request(Verb.PAUSE)


def test_nobody_there_is_told_by_path(run_dir: Path) -> None:
    with pytest.raises(GuestGone, match="no guest answers"):
        ControlClient(run_dir / "none", timeout_s=TIMEOUT_S)
