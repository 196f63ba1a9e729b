"""The 16 bytes before each record."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import limits
from transport.errors import FrameTooLarge, LocalMisuse, PeerMisbehaved
from transport.frames import HEADER_BYTES, Header, Kind, pack_header, parse_header

headers = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    slot=st.integers(0, limits.MAX_CONNECTIONS - 1),
    payload_bytes=st.integers(1, limits.MAX_PAYLOAD_BYTES),
    seq=st.integers(0, limits.MAX_RECORDS - 1),
)


@settings(deadline=None)
@given(headers)
def test_a_header_comes_back_as_it_went(header: Header) -> None:
    packed = pack_header(header)
    assert len(packed) == HEADER_BYTES
    assert parse_header(packed, expect=header.kind, max_payload_bytes=limits.MAX_PAYLOAD_BYTES) == header


@settings(deadline=None)
@given(st.binary(max_size=20) | st.binary(min_size=14, max_size=14).map(lambda rest: b"\xf1\x01" + rest))
def test_garbage_raises_only_peer_misbehaved(data: bytes) -> None:
    with contextlib.suppress(PeerMisbehaved):
        parse_header(data, expect=Kind.DATA, max_payload_bytes=100)


@pytest.mark.parametrize(
    ("position", "value"), [(0, 0xF2), (1, 0), (1, Kind.ACK), (1, 3), (2, 0xFF), (8, 0x01)]
)
def test_each_field_has_its_limit(position: int, value: int) -> None:
    packed = bytearray(pack_header(Header(kind=Kind.DATA, slot=0, payload_bytes=5, seq=0)))
    packed[position] = value
    with pytest.raises(PeerMisbehaved):
        parse_header(packed, expect=Kind.DATA, max_payload_bytes=5)


def test_a_payload_at_the_limit_passes_and_one_byte_more_is_too_large() -> None:
    packed = pack_header(Header(kind=Kind.DATA, slot=0, payload_bytes=100, seq=0))
    assert parse_header(packed, expect=Kind.DATA, max_payload_bytes=100).payload_bytes == 100
    with pytest.raises(FrameTooLarge) as caught:
        parse_header(packed, expect=Kind.DATA, max_payload_bytes=99)
    assert (caught.value.got_bytes, caught.value.limit_bytes) == (100, 99)


@pytest.mark.parametrize(
    "header",
    [
        Header(kind=Kind.DATA, slot=limits.MAX_CONNECTIONS, payload_bytes=1, seq=0),
        Header(kind=Kind.DATA, slot=0, payload_bytes=0, seq=0),
        Header(kind=Kind.DATA, slot=0, payload_bytes=limits.MAX_PAYLOAD_BYTES + 1, seq=0),
        Header(kind=Kind.DATA, slot=0, payload_bytes=1, seq=limits.MAX_RECORDS),
        Header(kind=Kind.DATA, slot=0, payload_bytes=1, seq=-1),
    ],
)
def test_a_header_that_no_peer_would_take_is_a_bug_of_the_sender(header: Header) -> None:
    with pytest.raises(LocalMisuse):
        pack_header(header)
