"""A data connection proves whose it is, or is closed without a word."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import limits
from transport.errors import LocalMisuse, PeerGone, PeerMisbehaved, TransportError
from transport.hello import (
    CHALLENGE_BYTES,
    HELLO_BYTES,
    PROOF_BYTES,
    Hello,
    answer_hello,
    client_tag,
    say_hello,
)

KEY = b"k" * 32
SESSION_ID = b"s" * 16


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


class Answering(threading.Thread):
    """A server's side of one hello."""

    def __init__(self, sock: socket.socket, keys: dict[bytes, bytes], timeout_s: float = 5) -> None:
        super().__init__()
        self._sock = sock
        self._keys = keys
        self._timeout_s = timeout_s
        self.outcome: Hello | TransportError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = answer_hello(self._sock, self._keys.get, timeout_s=self._timeout_s)
        except TransportError as exc:
            self.outcome = exc
            self._sock.close()

    def ended(self) -> Hello | TransportError | None:
        self.join()
        return self.outcome


@pytest.mark.parametrize("slot", [0, limits.MAX_CONNECTIONS - 1])
def test_both_sides_prove_themselves(pair: tuple[socket.socket, socket.socket], slot: int) -> None:
    server = Answering(pair[1], {SESSION_ID: KEY})
    say_hello(pair[0], SESSION_ID, slot, KEY)
    assert server.ended() == Hello(session_id=SESSION_ID, slot=slot)
    assert pair[0].gettimeout() is None
    assert pair[1].gettimeout() is None


@pytest.mark.parametrize("keys", [{}, {SESSION_ID: b"x" * 32}, {b"t" * 16: KEY}])
def test_a_wrong_key_and_an_unknown_session_look_the_same_to_the_client(
    pair: tuple[socket.socket, socket.socket], keys: dict[bytes, bytes]
) -> None:
    server = Answering(pair[1], keys)
    with pytest.raises(PeerGone, match="closed a data connection"):
        say_hello(pair[0], SESSION_ID, 0, KEY)
    assert isinstance(server.ended(), PeerMisbehaved)
    assert str(server.outcome) == "a data connection did not prove that it belongs to a migration here"


def test_a_server_that_does_not_know_the_key_is_found_out(pair: tuple[socket.socket, socket.socket]) -> None:
    def impostor() -> None:
        pair[1].sendall(bytes(CHALLENGE_BYTES))
        pair[1].recv(HELLO_BYTES, socket.MSG_WAITALL)
        pair[1].sendall(bytes(PROOF_BYTES))

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(PeerMisbehaved):
        say_hello(pair[0], SESSION_ID, 0, KEY)
    thread.join()


def test_a_recorded_hello_is_worth_nothing_later() -> None:
    near, middle_near = socket.socketpair()
    middle_far, far = socket.socketpair()
    with near, middle_near, middle_far, far:
        server = Answering(far, {SESSION_ID: KEY})

        def relay() -> None:
            middle_near.sendall(middle_far.recv(CHALLENGE_BYTES, socket.MSG_WAITALL))
            recorded.append(middle_near.recv(HELLO_BYTES, socket.MSG_WAITALL))
            middle_far.sendall(recorded[0])
            middle_near.sendall(middle_far.recv(PROOF_BYTES, socket.MSG_WAITALL))

        recorded: list[bytes] = []
        thread = threading.Thread(target=relay)
        thread.start()
        say_hello(near, SESSION_ID, 0, KEY)
        thread.join()
        assert isinstance(server.ended(), Hello)
    near, far = socket.socketpair()
    with near, far:
        server = Answering(far, {SESSION_ID: KEY})
        near.recv(CHALLENGE_BYTES, socket.MSG_WAITALL)
        near.sendall(recorded[0])
        assert isinstance(server.ended(), PeerMisbehaved)


@pytest.mark.parametrize(("at", "value"), [(0, 0x57), (4, 2), (5, 1), (6, 1)])
def test_a_field_out_of_range_is_refused_even_with_a_good_tag(
    pair: tuple[socket.socket, socket.socket], at: int, value: int
) -> None:
    server = Answering(pair[1], {SESSION_ID: KEY})
    challenge = pair[0].recv(CHALLENGE_BYTES, socket.MSG_WAITALL)
    fields = bytearray(b"VMFD\x01\x00\x00\x00" + SESSION_ID + bytes(16))
    fields[at] = value
    pair[0].sendall(bytes(fields) + client_tag(KEY, challenge, bytes(fields)))
    assert isinstance(server.ended(), PeerMisbehaved)


def test_a_client_that_says_nothing_is_given_up(pair: tuple[socket.socket, socket.socket]) -> None:
    outcome = Answering(pair[1], {SESSION_ID: KEY}, timeout_s=0.02).ended()
    assert isinstance(outcome, PeerGone)


def test_a_client_that_hangs_up_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert isinstance(Answering(pair[1], {SESSION_ID: KEY}).ended(), PeerGone)


@pytest.mark.parametrize(("session_id", "slot"), [(b"short", 0), (SESSION_ID, -1), (SESSION_ID, 64)])
def test_a_hello_that_no_server_would_take_is_a_bug(
    pair: tuple[socket.socket, socket.socket], session_id: bytes, slot: int
) -> None:
    with pytest.raises(LocalMisuse):
        say_hello(pair[0], session_id, slot, KEY)


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=100))
def test_garbage_raises_only_errors_of_the_peer(garbage: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(garbage)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises((PeerMisbehaved, PeerGone)):
            answer_hello(far, {SESSION_ID: KEY}.get, timeout_s=5)
