"""Calls over broken channels: at most once, in order, and honest about what may have left."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from tests.faults import Fuse, fused_stream_pair
from tests.waiting import delay
from transport.credit import Backoff
from transport.errors import BadMessage, LocalMisuse, PeerGone, PeerMisbehaved, PeerRefused, SessionForgotten
from transport.schema import Schema
from transport.session import (
    INTERNAL_ERROR,
    SESSION_SCHEMA,
    TOO_MANY_SESSIONS,
    Attach,
    Attached,
    Call,
    CallServer,
    CallSession,
    Handler,
    Refusal,
    Reply,
)
from transport.wire import MessageChannel

pytestmark = pytest.mark.anyio

SESSION_ID = b"s" * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    total: int


SCHEMA = Schema(Add, Sum)


@dataclass
class Adder:
    """A handler that remembers everything that it was asked to do."""

    executed: list[int] = field(default_factory=list)

    async def __call__(self, request: object) -> object:
        assert isinstance(request, Add)
        self.executed.append(request.number)
        await anyio.lowlevel.checkpoint()
        return Sum(total=sum(self.executed))


def backoff() -> Backoff:
    return Backoff(0.001, 0.002, random.Random(1))


@dataclass
class World:
    """One server; each dial makes a new pair of streams under the same fuse."""

    server: CallServer
    handler: Handler
    tasks: anyio.abc.TaskGroup
    fuse: Fuse
    owner: str = ""
    dials: int = 0

    async def dial(self) -> MessageChannel:
        self.dials += 1
        ours, theirs = fused_stream_pair(self.fuse)
        self.tasks.start_soon(self._serve, MessageChannel(theirs, SESSION_SCHEMA))
        return MessageChannel(ours, SESSION_SCHEMA)

    async def _serve(self, channel: MessageChannel) -> None:
        await self.server.serve(channel, self.handler, owner=self.owner)

    def session(self, *, outage_s: float = 5, session_id: bytes = SESSION_ID) -> CallSession:
        return CallSession(self.dial, SCHEMA, session_id, outage_s=outage_s, backoff=backoff())


@asynccontextmanager
async def world(
    handler: Handler,
    fuse: Fuse | None = None,
    *,
    max_sessions: int = 4,
    max_per_owner: int = 4,
    on_error: Callable[[Exception], None] | None = None,
) -> AsyncIterator[World]:
    async with (
        CallServer(
            SCHEMA, max_sessions=max_sessions, max_per_owner=max_per_owner, on_error=on_error
        ) as server,
        anyio.create_task_group() as tasks,
    ):
        yield World(server, handler, tasks, fuse or Fuse())
        tasks.cancel_scope.cancel()


async def three_calls(session: CallSession) -> list[object]:
    replies = [await session.call(Add(number=number), timeout_s=5) for number in (1, 10, 100)]
    await session.aclose()
    return replies


SUMS = [Sum(total=1), Sum(total=11), Sum(total=111)]


async def test_calls_are_answered_in_order_on_one_channel() -> None:
    adder = Adder()
    async with world(adder) as here:
        session = here.session()
        assert await three_calls(session) == SUMS
    assert here.dials == 1
    assert session.link_breaks == 0


async def operations_of_a_quiet_run() -> int:
    fuse = Fuse()
    async with world(Adder(), fuse) as here:
        await three_calls(here.session())
    return fuse.operations


async def test_a_quiet_run_has_fewer_operations_than_the_cut_test_tries() -> None:
    assert await operations_of_a_quiet_run() <= QUIET_RUN_OPERATIONS


QUIET_RUN_OPERATIONS = 18


@pytest.mark.parametrize("lose_after_send", [False, True])
@pytest.mark.parametrize("at", range(QUIET_RUN_OPERATIONS))
async def test_a_cut_at_any_operation_neither_loses_nor_repeats_a_call(
    at: int, lose_after_send: bool
) -> None:
    adder = Adder()
    async with world(adder, Fuse(at, lose_after_send)) as here:
        assert await three_calls(here.session()) == SUMS
    assert adder.executed == [1, 10, 100]


async def test_a_refusal_of_the_handler_reaches_the_caller_in_its_own_words() -> None:
    async def refuse(request: object) -> object:
        raise PeerRefused("no-room", "there is no room here")

    async with world(refuse) as here:
        with pytest.raises(PeerRefused, match="there is no room here") as caught:
            await here.session().call(Add(number=1), timeout_s=5)
    assert caught.value.code == "no-room"


async def test_a_handler_that_fails_is_heard_of_and_does_not_end_the_server() -> None:
    heard: list[Exception] = []
    failed = False

    async def fail_once(request: object) -> object:
        nonlocal failed
        if not failed:
            failed = True
            raise KeyError("a bug")
        return Sum(total=7)

    async with world(fail_once, on_error=heard.append) as here:
        session = here.session()
        with pytest.raises(PeerRefused) as caught:
            await session.call(Add(number=1), timeout_s=5)
        assert await session.call(Add(number=1), timeout_s=5) == Sum(total=7)
    assert caught.value.code == INTERNAL_ERROR
    assert "a bug" not in caught.value.text
    assert [type(each) for each in heard] == [KeyError]


async def test_a_call_that_never_found_a_link_says_that_it_did_not_reach_the_peer() -> None:
    async def dial() -> MessageChannel:
        raise OSError("no route to host")

    session = CallSession(dial, SCHEMA, SESSION_ID, outage_s=0.01, backoff=backoff())
    with pytest.raises(PeerGone, match="no route to host") as caught:
        await session.call(Add(number=1), timeout_s=5)
    assert caught.value.may_have_reached_peer is False


async def test_a_call_whose_link_broke_while_it_waited_says_that_it_may_have_reached_the_peer() -> None:
    dials = 0

    async def dial() -> MessageChannel:
        nonlocal dials
        dials += 1
        if dials > 1:
            raise OSError("no route to host")
        ours, theirs = fused_stream_pair(Fuse())
        server = MessageChannel(theirs, SESSION_SCHEMA)
        await server.send(Attached())
        tasks.start_soon(swallow_one_call, server)
        return MessageChannel(ours, SESSION_SCHEMA)

    async def swallow_one_call(server: MessageChannel) -> None:
        await server.receive()
        await server.receive()
        await server.aclose()

    async with anyio.create_task_group() as tasks:
        session = CallSession(dial, SCHEMA, SESSION_ID, outage_s=0.01, backoff=backoff())
        with pytest.raises(PeerGone) as caught:
            await session.call(Add(number=1), timeout_s=5)
    assert caught.value.may_have_reached_peer is True
    assert session.link_breaks == 1


async def test_a_reply_that_does_not_come_in_time_is_a_peer_that_is_gone() -> None:
    async def never(request: object) -> object:
        await anyio.sleep_forever()
        raise AssertionError

    async with world(never) as here:
        with pytest.raises(PeerGone, match="no reply within") as caught:
            await here.session().call(Add(number=1), timeout_s=0.02)
    assert caught.value.may_have_reached_peer is True


async def test_a_restarted_server_executes_nothing_of_a_session_it_does_not_know() -> None:
    adder = Adder()
    async with world(adder) as here:
        session = here.session()
        await session.call(Add(number=1), timeout_s=5)
        await session.aclose()
        here.server.forget(SESSION_ID)
        with pytest.raises(SessionForgotten, match="restarted") as caught:
            await session.call(Add(number=2), timeout_s=5)
    assert caught.value.may_have_reached_peer is False
    assert adder.executed == [1]


async def test_a_server_that_forgot_the_session_of_a_call_under_way_leaves_it_in_doubt() -> None:
    async def forget_and_hang_up(request: object) -> object:
        here.server.forget(SESSION_ID)
        for channel in channels:
            await channel.aclose()
        return Sum(total=0)

    channels: list[MessageChannel] = []
    async with world(forget_and_hang_up) as here:

        async def dial() -> MessageChannel:
            channels.append(await here.dial())
            return channels[-1]

        session = CallSession(dial, SCHEMA, SESSION_ID, outage_s=5, backoff=backoff())
        with pytest.raises(SessionForgotten, match="restarted") as caught:
            await session.call(Add(number=1), timeout_s=5)
    assert caught.value.may_have_reached_peer is True


async def test_a_session_belongs_to_the_peer_that_began_it() -> None:
    async with world(Adder()) as here:
        here.owner = "agent/host-a"
        await here.session().call(Add(number=1), timeout_s=5)
        here.owner = "agent/host-x"
        with pytest.raises(SessionForgotten):
            await here.session().call(Add(number=2), timeout_s=5)


async def test_one_session_more_than_the_limit_is_refused() -> None:
    async with world(Adder(), max_sessions=2) as here:
        for number in range(2):
            session = here.session(session_id=bytes([number]) * 16)
            await session.call(Add(number=number), timeout_s=5)
        with pytest.raises(PeerRefused) as caught:
            await here.session(session_id=b"x" * 16).call(Add(number=9), timeout_s=5)
    assert caught.value.code == TOO_MANY_SESSIONS


async def test_no_peer_takes_the_sessions_of_all() -> None:
    async with world(Adder(), max_sessions=4, max_per_owner=2) as here:
        here.owner = "host-a"
        for number in range(2):
            await here.session(session_id=bytes([number]) * 16).call(Add(number=number), timeout_s=5)
        with pytest.raises(PeerRefused, match="2 sessions of host-a are open here") as caught:
            await here.session(session_id=b"x" * 16).call(Add(number=9), timeout_s=5)
        assert caught.value.code == TOO_MANY_SESSIONS
        here.owner = "host-x"
        await here.session(session_id=b"y" * 16).call(Add(number=9), timeout_s=5)
        # Nobody ends another one's session; one that has ended makes room.
        here.server.forget(bytes(16), "host-x")
        assert here.server.remembers(bytes(16), "host-a")
        assert not here.server.remembers(bytes(16), "host-x")
        here.server.forget(bytes(16), "host-a")
        here.owner = "host-a"
        await here.session(session_id=b"x" * 16).call(Add(number=9), timeout_s=5)


async def test_two_calls_at_once_are_a_bug_of_the_caller() -> None:
    async def never(request: object) -> object:
        await anyio.sleep_forever()
        raise AssertionError

    async with world(never) as here:
        session = here.session()

        async def first() -> None:
            await session.call(Add(number=1), timeout_s=5)

        here.tasks.start_soon(first)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(LocalMisuse):
            await session.call(Add(number=2), timeout_s=5)


async def raw_channel(here: World) -> MessageChannel:
    channel = await here.dial()
    await channel.send(Attach(session_id=SESSION_ID, is_new=True))
    assert await channel.receive() == Attached()
    return channel


def body(number: int) -> bytes:
    return SCHEMA.encode(Add(number=number))


async def test_a_seq_that_is_repeated_while_it_runs_waits_for_the_running_one() -> None:
    may_end = anyio.Event()
    started: list[int] = []

    async def slow(request: object) -> object:
        assert isinstance(request, Add)
        started.append(request.number)
        await may_end.wait()
        return Sum(total=5)

    async with world(slow) as here:
        first = await raw_channel(here)
        await first.send(Call(seq=1, body=body(1)))
        await anyio.wait_all_tasks_blocked()
        await first.aclose()
        second = await raw_channel(here)
        await second.send(Call(seq=1, body=body(1)))
        await anyio.wait_all_tasks_blocked()
        may_end.set()
        assert await second.receive() == Reply(seq=1, body=SCHEMA.encode(Sum(total=5)))
    assert started == [1]


async def test_the_ghost_of_an_older_call_is_dropped() -> None:
    adder = Adder()
    async with world(adder) as here:
        ghostly = await raw_channel(here)
        fresh = await raw_channel(here)
        await fresh.send(Call(seq=2, body=body(2)))
        await fresh.receive()
        await ghostly.send(Call(seq=1, body=body(1)))
        await anyio.wait_all_tasks_blocked()
        await fresh.send(Call(seq=3, body=body(3)))
        await fresh.receive()
    assert adder.executed == [2, 3]


async def test_a_new_call_waits_until_the_one_that_was_given_up_has_ended() -> None:
    may_end = anyio.Event()
    given_up = anyio.CancelScope()
    ended: list[int] = []

    async def slow_first(request: object) -> object:
        assert isinstance(request, Add)
        if request.number == 1:
            given_up.cancel()
            await may_end.wait()
        ended.append(request.number)
        return Sum(total=request.number)

    async with world(slow_first) as here:
        session = here.session()
        with given_up:
            await session.call(Add(number=1), timeout_s=5)

        async def second() -> None:
            assert await session.call(Add(number=2), timeout_s=5) == Sum(total=2)
            all_done.set()

        all_done = anyio.Event()
        here.tasks.start_soon(second)
        await anyio.wait_all_tasks_blocked()
        assert ended == []
        may_end.set()
        await all_done.wait()
    assert ended == [1, 2]


@pytest.mark.parametrize(
    "message",
    [Attached(), Reply(seq=1, body=b""), Refusal(seq=1, code="", text=""), Call(seq=0, body=b"")],
)
async def test_what_is_no_call_ends_the_channel(message: object) -> None:
    async with CallServer(SCHEMA) as server:
        ours, theirs = fused_stream_pair(Fuse())
        channel = MessageChannel(ours, SESSION_SCHEMA)
        await channel.send(Attach(session_id=SESSION_ID, is_new=True))
        await channel.send(message)
        with pytest.raises(PeerMisbehaved):
            await server.serve(MessageChannel(theirs, SESSION_SCHEMA), Adder())


async def test_a_body_that_is_not_of_the_schema_ends_the_channel_before_anything_is_executed() -> None:
    adder = Adder()
    async with CallServer(SCHEMA) as server:
        ours, theirs = fused_stream_pair(Fuse())
        channel = MessageChannel(ours, SESSION_SCHEMA)
        await channel.send(Attach(session_id=SESSION_ID, is_new=True))
        await channel.send(Call(seq=1, body=b"\xc1"))
        with pytest.raises(BadMessage):
            await server.serve(MessageChannel(theirs, SESSION_SCHEMA), adder)
    assert adder.executed == []


async def test_a_caller_believes_no_reply_from_the_future() -> None:
    async def dial() -> MessageChannel:
        ours, theirs = fused_stream_pair(Fuse())
        server = MessageChannel(theirs, SESSION_SCHEMA)
        await server.send(Attached())
        await server.send(Reply(seq=2, body=SCHEMA.encode(Sum(total=1))))
        return MessageChannel(ours, SESSION_SCHEMA)

    session = CallSession(dial, SCHEMA, SESSION_ID, outage_s=1, backoff=backoff())
    with pytest.raises(PeerGone, match="where the reply to call 1 was due") as caught:
        await session.call(Add(number=1), timeout_s=5)
    assert isinstance(caught.value.__cause__, PeerMisbehaved)


async def test_the_first_message_may_have_been_received_by_the_caller_of_serve() -> None:
    async with CallServer(SCHEMA) as server, anyio.create_task_group() as tasks:

        async def dial() -> MessageChannel:
            ours, theirs = fused_stream_pair(Fuse())
            tasks.start_soon(serve, MessageChannel(theirs, SESSION_SCHEMA))
            return MessageChannel(ours, SESSION_SCHEMA)

        async def serve(channel: MessageChannel) -> None:
            attach = await channel.receive()
            assert isinstance(attach, Attach)
            await server.serve(channel, Adder(), attach=attach)

        session = CallSession(dial, SCHEMA, SESSION_ID, outage_s=1, backoff=backoff())
        assert await session.call(Add(number=3), timeout_s=5) == Sum(total=3)
        await session.aclose()


async def test_a_server_that_works_long_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.limits.WORKING_EVERY_S", 0.01)

    async def slowly(request: object) -> object:
        await delay(0.6)
        return Sum(total=1)

    async with world(slowly) as here:
        session = CallSession(here.dial, SCHEMA, SESSION_ID, outage_s=5, dead_peer_s=0.3, backoff=backoff())
        assert await session.call(Add(number=1), timeout_s=5) == Sum(total=1)
        assert session.link_breaks == 0


async def test_a_channel_that_falls_silent_is_dialled_again_and_executes_nothing_twice() -> None:
    adder = Adder()
    async with world(adder) as here:
        dials = 0

        async def dial() -> MessageChannel:
            nonlocal dials
            dials += 1
            # The first one takes everything in and gives nothing out, as a network that swallows packets does.
            return MessageChannel(SilentStream(), SESSION_SCHEMA) if dials == 1 else await here.dial()

        session = CallSession(dial, SCHEMA, SESSION_ID, outage_s=5, dead_peer_s=0.1, backoff=backoff())
        assert await session.call(Add(number=1), timeout_s=5) == Sum(total=1)
    # A busy machine may be silent for as long once more; what counts is that nothing is done twice.
    assert dials >= 2
    assert adder.executed == [1]


async def test_a_peer_that_stays_silent_is_gone_after_the_outage() -> None:
    async def dial() -> MessageChannel:
        return MessageChannel(SilentStream(), SESSION_SCHEMA)

    session = CallSession(dial, SCHEMA, SESSION_ID, outage_s=0.05, dead_peer_s=0.01, backoff=backoff())
    with pytest.raises(PeerGone, match=r"was down for 0.05 s: nothing came from the peer for 0.01 s"):
        await session.call(Add(number=1), timeout_s=5)


class SilentStream(anyio.abc.ByteStream):
    """A network that swallows everything."""

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.sleep_forever()
        raise AssertionError

    async def send_eof(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
