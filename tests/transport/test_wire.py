"""Messages on a stream: whole, in order, bounded, and honest about a torn one."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults import Fuse, FusedStream, fused_stream_pair
from transport import limits
from transport.errors import BadMessage, FrameTooLarge, LocalMisuse, PeerGone, PeerMisbehaved
from transport.schema import Schema
from transport.wire import MessageChannel

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    body: bytes


SCHEMA = Schema(Note)


def channels() -> tuple[MessageChannel, MessageChannel]:
    near, far = fused_stream_pair(Fuse())
    return MessageChannel(near, SCHEMA), MessageChannel(far, SCHEMA)


def raw() -> tuple[FusedStream, MessageChannel]:
    near, far = fused_stream_pair(Fuse())
    return near, MessageChannel(far, SCHEMA)


@pytest.mark.parametrize("size", [0, 1, 70_000, 1 << 20])
async def test_messages_arrive_whole_and_in_order(size: int) -> None:
    near, far = channels()
    sent = [Note(body=bytes([number]) * size) for number in range(3)]
    for note in sent:
        await near.send(note)
    assert [await far.receive() for _ in sent] == sent


async def test_a_receive_that_was_cancelled_loses_nothing() -> None:
    near, far = raw()
    body = SCHEMA.encode(Note(body=b"abc"))
    frame = struct.pack("!I", len(body)) + body
    for cut in range(1, len(frame)):
        await near.send(frame[:cut])
        with anyio.move_on_after(0.001) as scope:
            await far.receive()
        assert scope.cancelled_caught
        await near.send(frame[cut:])
        assert await far.receive() == Note(body=b"abc")


async def test_a_send_that_broke_half_way_breaks_the_channel() -> None:
    near, far = fused_stream_pair(Fuse(1))
    channel = MessageChannel(near, SCHEMA)
    with pytest.raises(PeerGone):
        await channel.send(Note(body=bytes(1 << 20)))
    with pytest.raises(PeerGone) as caught:
        await channel.send(Note(body=b"next"))
    assert caught.value.may_have_reached_peer is False
    await far.aclose()


async def test_the_end_of_the_stream_is_a_peer_that_is_gone() -> None:
    near, far = channels()
    await near.aclose()
    await near.aclose()
    for _ in range(2):
        with pytest.raises(PeerGone):
            await far.receive()
    with pytest.raises(PeerGone):
        await far.send(Note(body=b""))


async def test_a_length_over_the_limit_is_refused_before_a_byte_of_it_is_read() -> None:
    near, far = raw()
    await near.send(struct.pack("!I", limits.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(FrameTooLarge):
        await far.receive()
    with pytest.raises(PeerGone):
        await far.send(Note(body=b""))


async def test_a_channel_that_takes_less_refuses_one_byte_more_before_it_comes() -> None:
    near, far = fused_stream_pair(Fuse())
    bounded = MessageChannel(far, SCHEMA, max_receive_bytes=100)
    await near.send(struct.pack("!I", 101))
    with pytest.raises(FrameTooLarge, match="101 bytes where at most 100"):
        await bounded.receive()


async def test_a_message_of_no_bytes_is_refused() -> None:
    near, far = raw()
    await near.send(bytes(4))
    with pytest.raises(BadMessage):
        await far.receive()


async def test_a_message_of_another_schema_is_a_bug_and_leaves_the_channel_whole() -> None:
    near, far = channels()
    with pytest.raises(LocalMisuse):
        await near.send("text")
    await near.send(Note(body=b"well"))
    assert await far.receive() == Note(body=b"well")


@settings(deadline=None, max_examples=60)
@given(garbage=st.binary(min_size=1, max_size=60))
async def test_garbage_raises_only_errors_of_the_peer(garbage: bytes) -> None:
    near, far = raw()
    await near.send(garbage)
    await near.send_eof()
    with pytest.raises((PeerMisbehaved, PeerGone)):
        await far.receive()
