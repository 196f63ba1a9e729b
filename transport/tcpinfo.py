"""What the kernel knows of a TCP connection: round trip, path MTU, segment size, retransmissions.

Law: reads a socket, changes nothing. What a kernel does not tell is None.
Source: Linux include/uapi/linux/tcp.h, struct tcp_info; tcp(7), ip(7), ipv6(7).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["TcpFacts", "parse_tcp_info", "tcp_facts", "worst_of"]

# Offsets in struct tcp_info, which only ever grows at its end.
_SND_MSS: Final = 16
_RTT_US: Final = 68
_TOTAL_RETRANS: Final = 100
_MIN_RTT_US: Final = 148
_INFO_BYTES: Final = 256
_U32: Final = struct.Struct("=I")
# The smallest round trip is all ones until there is one.
_NO_RTT: Final = 0xFFFFFFFF
# Not in Python's socket module: linux/in.h, linux/in6.h.
_IP_MTU: Final = 14
_IPV6_MTU: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpFacts:
    """One connection, or the worst of several. `rtt_s` is the smallest round trip that TCP has seen."""

    rtt_s: float | None = None
    mtu_bytes: int | None = None
    mss_bytes: int | None = None
    retransmits: int = 0


def tcp_facts(sock: socket.socket) -> TcpFacts:
    """Ask the kernel about a connection; all None for a socket that is closed or is no TCP."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return TcpFacts()
    try:
        facts = parse_tcp_info(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES))
        mss_bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    except OSError:
        return TcpFacts()
    return TcpFacts(
        rtt_s=facts.rtt_s,
        mtu_bytes=_mtu(sock),
        mss_bytes=mss_bytes or facts.mss_bytes,
        retransmits=facts.retransmits,
    )


def parse_tcp_info(info: bytes) -> TcpFacts:
    """Read a struct tcp_info, of any kernel's length."""

    def field(offset: int) -> int | None:
        return _U32.unpack_from(info, offset)[0] if len(info) >= offset + _U32.size else None

    smallest_us = field(_MIN_RTT_US)
    rtt_us = field(_RTT_US) if smallest_us in (None, 0, _NO_RTT) else smallest_us
    return TcpFacts(
        rtt_s=rtt_us / 1e6 if rtt_us else None,
        mss_bytes=field(_SND_MSS) or None,
        retransmits=field(_TOTAL_RETRANS) or 0,
    )


def worst_of(connections: Iterable[TcpFacts]) -> TcpFacts:
    """Put the connections of one path together: its smallest round trip, MTU and segments, all retransmissions."""
    all_facts = list(connections)
    return TcpFacts(
        rtt_s=min((one.rtt_s for one in all_facts if one.rtt_s is not None), default=None),
        mtu_bytes=min((one.mtu_bytes for one in all_facts if one.mtu_bytes is not None), default=None),
        mss_bytes=min((one.mss_bytes for one in all_facts if one.mss_bytes is not None), default=None),
        retransmits=sum(one.retransmits for one in all_facts),
    )


def _mtu(sock: socket.socket) -> int | None:
    level, option = (
        (socket.IPPROTO_IP, _IP_MTU) if sock.family == socket.AF_INET else (socket.IPPROTO_IPV6, _IPV6_MTU)
    )
    try:
        return sock.getsockopt(level, option)
    except OSError:
        return None
