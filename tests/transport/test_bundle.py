"""The data plane over real sockets: whole through breaks, once each, ended by a cancellation."""

from __future__ import annotations

import functools
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest

from transport import limits
from transport.bundle import ReceiveBundle, SendBundle
from transport.errors import LocalMisuse, PeerGone, PeerMisbehaved
from transport.hello import answer_hello, say_hello
from transport.producer import NOT_YET
from transport.seal import Keys

pytestmark = pytest.mark.anyio

KEYS = Keys(b"k" * 32)
SESSION_ID = b"s" * 16
PAYLOAD_BYTES = 64 * limits.KIB


@dataclass
class Numbers:
    """A producer of numbered payloads; `until` is exclusive."""

    until: int
    payload_bytes: int = 1000
    given: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, buffer: memoryview) -> int:
        with self.lock:
            if self.given == self.until:
                return 0
            number = self.given
            self.given += 1
        buffer[:8] = struct.pack("!Q", number)
        return self.payload_bytes


@dataclass
class Seen:
    """A consumer that notes the numbers in the order in which they were applied."""

    numbers: list[int] = field(default_factory=list)
    on_payload: Callable[[int], object] = lambda number: None

    def __call__(self, payload: memoryview) -> None:
        number = struct.unpack("!Q", payload[:8])[0]
        self.on_payload(number)
        self.numbers.append(number)


@dataclass
class Ends:
    """Both bundles, joined by socket pairs that pass the hello."""

    sender: SendBundle
    receiver: ReceiveBundle
    tasks: anyio.abc.TaskGroup
    misbehaved: list[PeerMisbehaved] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    is_unreachable: bool = False
    dials: int = 0


@asynccontextmanager
async def ends(
    consumer: Callable[[memoryview], None],
    *,
    connections: int = 2,
    window_bytes: int = 256 * limits.KIB,
    bandwidth_bytes_per_s: float | None = None,
    outage_s: float = 5.0,
    dead_peer_s: float = 5.0,
    on_event: Callable[[str], None] | None = None,
) -> AsyncIterator[Ends]:
    receiver = ReceiveBundle(
        keys=KEYS, consumer=consumer, window_bytes=window_bytes, max_payload_bytes=PAYLOAD_BYTES
    )

    async def serve(sock: socket.socket) -> None:
        try:
            await anyio.to_thread.run_sync(answer_hello, sock, {SESSION_ID: KEYS.hello}.get)
            await receiver.serve_connection(sock)
        except PeerMisbehaved as exc:
            both.misbehaved.append(exc)
        except PeerGone:
            pass
        finally:
            sock.close()

    async def dial(slot: int) -> socket.socket:
        both.dials += 1
        if both.is_unreachable:
            raise OSError("no route to host")
        ours, theirs = socket.socketpair()
        tasks.start_soon(serve, theirs)
        try:
            await anyio.to_thread.run_sync(functools.partial(say_hello, ours, SESSION_ID, slot, KEYS.hello))
        except BaseException:
            ours.close()
            raise
        return ours

    async with anyio.create_task_group() as tasks:
        events: list[str] = []
        sender = SendBundle(
            dial,
            keys=KEYS,
            connections=connections,
            window_bytes=window_bytes,
            max_payload_bytes=PAYLOAD_BYTES,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            outage_s=outage_s,
            dead_peer_s=dead_peer_s,
            on_event=on_event or events.append,
        )
        both = Ends(sender, receiver, tasks, events=events)
        try:
            yield both
        finally:
            with anyio.CancelScope(shield=True):
                await sender.aclose()
                await receiver.aclose()
            tasks.cancel_scope.cancel()


def live_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("connections", [1, 2, 4])
async def test_every_payload_is_applied_exactly_once(connections: int) -> None:
    seen = Seen()
    async with ends(seen, connections=connections) as both:
        await both.sender.send_all(Numbers(until=200))
        assert sorted(seen.numbers) == list(range(200))
        assert both.sender.acked_payload_bytes == 200 * 1000
        assert both.sender.wire_bytes == 200 * 1032
        assert both.sender.resent_bytes == 0
        assert both.sender.link_breaks == 0
        assert both.receiver.received_bytes == 200 * 1032
        assert both.sender.in_flight_bytes == 0


async def test_who_sends_hears_when_all_has_left_and_who_receives_when_all_is_applied() -> None:
    """The word that all has left overtakes the acknowledgements: here the last payload waits for it."""
    may_end, seen = threading.Event(), Seen()
    seen.on_payload = lambda number: number < 19 or may_end.wait(5)
    given: list[int] = []

    async def send_twenty(both: Ends, has_left: anyio.Event) -> None:
        def on_given(records: int) -> None:
            given.append(records)
            has_left.set()

        await both.sender.send_all(Numbers(until=20), on_given=on_given)

    async with ends(seen) as both:
        for records in (30, 60):
            await both.sender.send_all(Numbers(until=10))
            async with anyio.create_task_group() as tasks:
                has_left = anyio.Event()
                tasks.start_soon(send_twenty, both, has_left)
                with anyio.fail_after(4):
                    await has_left.wait()
                assert given[-1] == records
                assert await both.receiver.await_applied(records - 20, 4)
                assert not await both.receiver.await_applied(records, 0.05)
                may_end.set()
                assert await both.receiver.await_applied(records, 4)
            may_end.clear()
        assert given == [30, 60]
        assert not await both.receiver.await_applied(61, 0.0)
        await both.receiver.aclose()
        assert not await both.receiver.await_applied(61, 5)


async def test_a_round_that_fails_has_not_left() -> None:
    given: list[int] = []

    def fail(buffer: memoryview) -> int:
        raise RuntimeError("of the producer")

    async with ends(Seen()) as both:
        with pytest.raises(RuntimeError, match="of the producer"):
            await both.sender.send_all(fail, on_given=given.append)
        assert given == []
        # Nothing at all has left whole.
        await both.sender.send_all(lambda buffer: 0, on_given=given.append)
        assert given == [0]


async def test_a_round_is_applied_before_send_all_returns_and_the_next_reuses_its_connections() -> None:
    seen = Seen()
    async with ends(seen) as both:
        for _ in range(5):
            await both.sender.send_all(Numbers(until=3))
            assert len(seen.numbers) % 3 == 0
        assert len(seen.numbers) == 15
        assert both.dials <= 2


@pytest.mark.parametrize(("payloads", "dials"), [(0, 1), (1, 1), (2, 2), (3, 3), (9, 3), (None, 3)])
async def test_no_more_connections_are_woken_than_there_are_payloads(
    payloads: int | None, dials: int
) -> None:
    seen = Seen()
    async with ends(seen, connections=3) as both:
        # A producer that gives more than was said is served all the same.
        await both.sender.send_all(Numbers(until=40), payloads=payloads)
        assert sorted(seen.numbers) == list(range(40))
        assert both.dials <= dials


@pytest.mark.parametrize("connections", [1, 3])
async def test_a_producer_that_has_nothing_yet_is_asked_again_when_it_has(connections: int) -> None:
    ready: list[int] = []
    ended = threading.Event()

    def produce(buffer: memoryview) -> int:
        try:
            number = ready.pop(0)
        except IndexError:
            return 0 if ended.is_set() else NOT_YET
        buffer[:8] = struct.pack("!Q", number)
        return 1000

    seen = Seen()
    async with ends(seen, connections=connections) as both, anyio.create_task_group() as tasks:
        tasks.start_soon(both.sender.send_all, produce)
        for number in range(20):
            ready.append(number)
            both.sender.more_to_send()
            with anyio.fail_after(5):
                while len(seen.numbers) <= number:
                    await anyio.lowlevel.checkpoint()
        ended.set()
        both.sender.more_to_send()
    assert sorted(seen.numbers) == list(range(20))


async def test_a_round_that_waits_for_its_producer_can_be_cancelled() -> None:
    async with ends(Seen()) as both:
        with anyio.move_on_after(0.05):
            await both.sender.send_all(lambda buffer: NOT_YET)
        await both.sender.send_all(Numbers(until=3))


async def test_an_empty_round_ends() -> None:
    seen = Seen()
    async with ends(seen) as both:
        await both.sender.send_all(Numbers(until=0))
    assert seen.numbers == []


@pytest.mark.parametrize("break_at", [0, 1, 7, 50, 99])
async def test_a_break_loses_nothing_and_repeats_nothing(break_at: int) -> None:
    def break_once(number: int) -> None:
        if number == break_at and not broken:
            broken.append(number)
            both.sender.break_connections()

    broken: list[int] = []
    seen = Seen(on_payload=break_once)
    async with ends(seen) as both:
        await both.sender.send_all(Numbers(until=100, payload_bytes=20_000))
        assert sorted(seen.numbers) == list(range(100))
        assert both.sender.link_breaks >= 1
        assert both.receiver.records == 100
        assert any("broke" in event for event in both.events)


async def test_a_connection_that_died_between_two_rounds_is_made_again() -> None:
    seen = Seen()
    async with ends(seen) as both:
        await both.sender.send_all(Numbers(until=10))
        both.sender.break_connections()
        await both.sender.send_all(Numbers(until=10))
        assert sorted(seen.numbers) == sorted([*range(10), *range(10)])


async def test_no_connection_for_the_outage_is_a_peer_that_is_gone() -> None:
    async with ends(Seen(), outage_s=0.03) as both:
        both.is_unreachable = True
        with pytest.raises(PeerGone, match="no route to host"):
            await both.sender.send_all(Numbers(until=10))


async def test_a_peer_that_is_silent_for_too_long_is_a_broken_connection() -> None:
    may_go_on = threading.Event()
    seen = Seen(on_payload=lambda number: may_go_on.wait(10))
    async with ends(seen, dead_peer_s=0.05, connections=1, on_event=lambda event: may_go_on.set()) as both:
        await both.sender.send_all(Numbers(until=5))
        assert sorted(seen.numbers) == list(range(5))


@pytest.mark.parametrize(
    ("outage_s", "dead_peer_s"),
    # With the second one a connection stands idle for long enough to look well, while another one waits.
    [(0.2, 0.05), pytest.param(1.0, 0.6, marks=pytest.mark.slow)],
)
async def test_connections_that_are_made_and_never_acknowledge_anything_are_an_outage(
    outage_s: float, dead_peer_s: float
) -> None:
    is_over = threading.Event()
    seen = Seen(on_payload=lambda number: is_over.wait(30))
    async with ends(seen, outage_s=outage_s, dead_peer_s=dead_peer_s) as both:
        try:
            with anyio.fail_after(10), pytest.raises(PeerGone, match="no data connection worked"):
                await both.sender.send_all(Numbers(until=10))
        finally:
            is_over.set()


@pytest.mark.parametrize("bandwidth_bytes_per_s", [None, 0.0, 1000.0])
async def test_a_cancelled_round_ends_at_once_and_leaves_no_thread_at_work(
    bandwidth_bytes_per_s: float | None,
) -> None:
    endless = Numbers(until=-1)
    async with ends(Seen(), bandwidth_bytes_per_s=bandwidth_bytes_per_s) as both:
        with anyio.move_on_after(0.05):
            await both.sender.send_all(endless)
        given = endless.given
        await anyio.lowlevel.checkpoint()
        assert endless.given == given
        assert both.sender._limiter.borrowed_tokens == 0


async def test_what_a_cancelled_round_left_is_applied_before_anything_of_the_next() -> None:
    may_go_on = threading.Event()
    seen = Seen(on_payload=lambda number: may_go_on.wait(10))
    async with ends(seen) as both:
        with anyio.move_on_after(0.05):
            await both.sender.send_all(Numbers(until=6))
        may_go_on.set()
        await both.sender.send_all(Numbers(until=107, given=100))
        split = seen.numbers.index(min(number for number in seen.numbers if number >= 100))
        assert all(number >= 100 for number in seen.numbers[split:])
        assert len(seen.numbers) == len(set(seen.numbers))


async def test_the_error_of_a_producer_ends_the_round_as_itself() -> None:
    def fail(buffer: memoryview) -> int:
        raise ZeroDivisionError("a bug")

    async with ends(Seen()) as both:
        with pytest.raises(ZeroDivisionError):
            await both.sender.send_all(fail)


async def test_a_producer_that_claims_more_than_its_buffer_is_a_bug() -> None:
    async with ends(Seen()) as both:
        with pytest.raises(LocalMisuse):
            await both.sender.send_all(lambda buffer: len(buffer) + 1)


async def test_the_error_of_a_consumer_is_kept_and_nothing_more_is_consumed() -> None:
    def fail(payload: memoryview) -> None:
        calls.append(1)
        raise ZeroDivisionError("no room")

    calls: list[int] = []
    async with ends(fail, outage_s=0.03, connections=1) as both:
        with pytest.raises(PeerGone):
            await both.sender.send_all(Numbers(until=10))
        assert isinstance(both.receiver.failure, ZeroDivisionError)
        assert len(calls) == 1


async def test_a_held_bundle_sends_nothing_until_it_is_let_go() -> None:
    seen = Seen()
    async with ends(seen, bandwidth_bytes_per_s=0) as both:

        async def let_go() -> None:
            await anyio.wait_all_tasks_blocked()
            assert seen.numbers == []
            both.sender.set_bandwidth(None)

        both.tasks.start_soon(let_go)
        await both.sender.send_all(Numbers(until=10))
        assert len(seen.numbers) == 10


async def test_two_rounds_at_once_are_a_bug_of_the_caller() -> None:
    async with ends(Seen(), bandwidth_bytes_per_s=0) as both, anyio.create_task_group() as round_tasks:
        round_tasks.start_soon(both.sender.send_all, Numbers(until=1))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(LocalMisuse):
            await both.sender.send_all(Numbers(until=1))
        with pytest.raises(LocalMisuse):
            await both.sender.aclose()
        both.sender.set_bandwidth(None)
