from __future__ import annotations

import socket
import struct

from transport.tcpinfo import TcpFacts, parse_tcp_info, tcp_facts, worst_of


def info(*, mss: int = 1448, rtt_us: int = 900, retransmits: int = 3, smallest_us: int = 700) -> bytes:
    made = bytearray(232)
    for offset, value in ((16, mss), (68, rtt_us), (100, retransmits), (148, smallest_us)):
        struct.pack_into("=I", made, offset, value)
    return bytes(made)


def test_the_smallest_round_trip_goes_before_the_usual_one() -> None:
    assert parse_tcp_info(info()) == TcpFacts(rtt_s=0.0007, mss_bytes=1448, retransmits=3)
    for none_yet in (0, 0xFFFFFFFF):
        assert parse_tcp_info(info(smallest_us=none_yet)).rtt_s == 0.0009


def test_what_a_kernel_does_not_tell_is_none() -> None:
    # An older kernel's struct ends before the smallest round trip; an empty one tells nothing.
    assert parse_tcp_info(info()[:148]).rtt_s == 0.0009
    assert parse_tcp_info(b"") == TcpFacts()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert tcp_facts(ours) == TcpFacts()


def test_the_kernel_knows_a_loopback_connection_and_forgets_a_closed_one() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as near,
    ):
        facts = tcp_facts(near)
        assert facts.rtt_s
        assert facts.mtu_bytes
        assert facts.mss_bytes
        assert facts.mss_bytes < facts.mtu_bytes
    assert tcp_facts(near) == TcpFacts()


def test_a_path_is_as_good_as_its_worst_connection() -> None:
    one = TcpFacts(rtt_s=0.2, mtu_bytes=1500, mss_bytes=1448, retransmits=1)
    other = TcpFacts(rtt_s=0.1, mtu_bytes=1300, mss_bytes=1248, retransmits=2)
    worst = TcpFacts(rtt_s=0.1, mtu_bytes=1300, mss_bytes=1248, retransmits=3)
    assert worst_of([one, other, TcpFacts()]) == worst
    assert worst_of([]) == TcpFacts()
