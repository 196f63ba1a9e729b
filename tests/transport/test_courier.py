"""What a peer's acknowledgements may do to the sender: book a record, or break their own connection."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import limits
from transport.courier import ACK_BYTES, Courier
from transport.errors import BadSeal, PeerGone, PeerMisbehaved, ReplayedRecord
from transport.flow import Flow, Waker
from transport.frames import HEADER_BYTES, TAG_BYTES, Header, Kind, pack_header
from transport.seal import Keys, Opener, Sealer

KEYS = Keys(b"k" * 32)


def ack(of: int, seq: int, keys: Keys = KEYS) -> bytes:
    header = pack_header(Header(kind=Kind.ACK, slot=0, payload_bytes=8, seq=seq))
    out = bytearray(8 + TAG_BYTES)
    Sealer(keys, Kind.ACK).seal_into(seq, header, of.to_bytes(8, "big"), memoryview(out))
    return header + bytes(out)


@contextmanager
def courier(payloads: int = 2) -> Iterator[tuple[Courier, Flow, socket.socket]]:
    """A connection whose peer is the test."""
    ours, theirs = socket.socketpair()
    left = payloads

    def produce(buffer: memoryview) -> int:
        nonlocal left
        left -= 1
        return 10 if left >= 0 else 0

    flow = Flow(KEYS, window_bytes=limits.WINDOW_BYTES, max_payload_bytes=100, bandwidth_bytes_per_s=None)
    flow.begin(produce)
    carrier = Courier(ours, 0, flow, Opener(KEYS, Kind.ACK), dead_peer_s=0.02)
    with theirs:
        try:
            yield carrier, flow, theirs
        finally:
            carrier.close()


def carry_with(acks: list[bytes], payloads: int = 2) -> Flow:
    """Send all payloads, then let the acknowledgements come while the courier waits for them."""
    with courier(payloads) as (carrier, flow, peer):
        # One thread plays both sides: the peer's bytes come in when the courier first asks for acknowledgements
        # after its last record, which is when the producer is asked in vain.
        end_of_payloads = flow.end_of_payloads

        def send_acks() -> None:
            end_of_payloads()
            peer.sendall(b"".join(acks))

        flow.end_of_payloads = send_acks  # type: ignore[method-assign]
        carrier.carry()
        return flow


def test_the_round_is_done_when_every_record_is_acknowledged_in_any_order() -> None:
    flow = carry_with([ack(1, 0), ack(0, 5)])
    assert flow.is_round_done
    assert flow.acked_payload_bytes == 20
    assert flow.wire_bytes == 2 * (10 + HEADER_BYTES + TAG_BYTES)
    assert flow.in_flight_bytes == 0


@pytest.mark.parametrize(
    ("acks", "error"),
    [
        ([ack(0, 0), ack(0, 1)], PeerMisbehaved),  # twice
        ([ack(2, 0)], PeerMisbehaved),  # never sent
        ([ack(0, 1), ack(1, 0)], ReplayedRecord),  # out of order
        ([ack(0, 0), ack(1, 0)], ReplayedRecord),  # a number again
        ([ack(0, 0, Keys(b"x" * 32))], BadSeal),
        ([ack(0, 0)[:-1] + b"\x00"], BadSeal),
        ([b"HTTP/1.1 400 Bad Request".ljust(ACK_BYTES)], PeerMisbehaved),
        ([ack(0, 0)], PeerGone),  # and then silence, for longer than the bound
    ],
)
def test_each_wrong_acknowledgement_breaks_the_connection(acks: list[bytes], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        carry_with(acks)
    assert type(caught.value) is error


def test_an_acknowledgement_of_a_record_that_waits_for_the_rate_breaks_the_connection() -> None:
    # The peer may have it: who is on the path sent it there on another connection, and now it goes again.
    with courier(payloads=1) as (carrier, flow, peer):

        def pace(taken_bytes: int, waker: Waker) -> tuple[float, int]:
            peer.sendall(ack(0, 0))
            return 0.01, 0

        flow.pace = pace  # type: ignore[method-assign]
        with pytest.raises(PeerMisbehaved, match="before it was sent"):
            carrier.carry()
        assert not flow.is_round_done
        assert flow.in_flight_bytes > 0


def test_a_peer_that_hung_up_between_two_rounds_is_seen_before_anything_is_sent() -> None:
    with courier() as (carrier, flow, peer):
        peer.shutdown(socket.SHUT_RDWR)
        with pytest.raises(PeerGone, match="closed"):
            carrier.carry()
        assert flow.wire_bytes == 0
        assert not carrier.has_worked


@settings(deadline=None, max_examples=40)
@given(st.binary(min_size=ACK_BYTES, max_size=3 * ACK_BYTES))
def test_garbage_raises_only_errors_of_the_peer(garbage: bytes) -> None:
    with pytest.raises(PeerMisbehaved):
        carry_with([garbage])
