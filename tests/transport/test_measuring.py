"""A measurement over real sockets: its figure, its ends, and what it holds and leaves behind."""

from __future__ import annotations

import socket
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import anyio
import anyio.to_thread
import pytest

from tests.waiting import delay_blocking
from transport import limits
from transport.bundle import ReceiveBundle
from transport.errors import PeerGone, PeerMisbehaved
from transport.measuring import measure
from transport.seal import Keys

pytestmark = pytest.mark.anyio

KEYS = Keys(b"k" * 32)
WINDOW_BYTES = 256 * limits.KIB
FOR_S = 0.2


@dataclass
class Far:
    """The other end, and the connections to it."""

    receiver: ReceiveBundle
    connections: dict[int, socket.socket]


@asynccontextmanager
async def far_end(
    consumer: Callable[[memoryview], None], *, connections: int = 2, limit_bytes: int = limits.MEASURE_BYTES
) -> AsyncIterator[Far]:
    receiver = ReceiveBundle(
        keys=KEYS, consumer=consumer, window_bytes=limits.WINDOW_BYTES, limit_bytes=limit_bytes
    )

    async def serve(sock: socket.socket) -> None:
        with suppress(PeerGone, PeerMisbehaved):
            await receiver.serve_connection(sock)

    async with anyio.create_task_group() as tasks:
        ours: dict[int, socket.socket] = {}
        for slot in range(connections):
            ours[slot], theirs = socket.socketpair()
            tasks.start_soon(serve, theirs)
        try:
            yield Far(receiver, ours)
        finally:
            with anyio.CancelScope(shield=True):
                await receiver.aclose()
            for sock in ours.values():
                sock.close()


async def test_the_figure_is_what_was_acknowledged_in_the_time() -> None:
    async with far_end(lambda payload: None) as far:
        began_s = time.monotonic()
        measured = await measure(
            far.connections, keys=KEYS, window_bytes=WINDOW_BYTES, limit_bytes=1 << 40, for_s=FOR_S
        )
        took_s = time.monotonic() - began_s
    assert FOR_S <= measured.took_s <= took_s < FOR_S + 2
    assert 0 < measured.acked_bytes <= far.receiver.received_bytes
    assert measured.broke == ""
    assert all(sock.fileno() == -1 for sock in far.connections.values())


async def test_a_link_that_is_slower_than_one_page_batch_a_second_has_a_figure() -> None:
    def slowly(payload: memoryview) -> None:
        delay_blocking(len(payload) / (200 * limits.KIB))

    async with far_end(slowly, connections=1) as far:
        measured = await measure(
            far.connections, keys=KEYS, window_bytes=WINDOW_BYTES, limit_bytes=1 << 30, for_s=1.0
        )
    assert 100 * limits.KIB < measured.acked_bytes / measured.took_s < 300 * limits.KIB


async def test_the_byte_cap_ends_it_before_its_time_and_is_never_passed() -> None:
    cap = 3 * limits.MIB
    async with far_end(lambda payload: None, limit_bytes=cap) as far:
        measured = await measure(
            far.connections, keys=KEYS, window_bytes=WINDOW_BYTES, limit_bytes=cap, for_s=20
        )
        assert far.receiver.failure is None
        assert cap - 64 * limits.KIB < far.receiver.received_bytes <= cap
    assert measured.took_s < 10
    assert measured.broke == ""
    assert measured.acked_bytes <= cap


async def test_no_destination_makes_a_source_send_more_than_its_own_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MEASURE_BYTES", limits.MIB)
    async with far_end(lambda payload: None, limit_bytes=1 << 40) as far:
        await measure(far.connections, keys=KEYS, window_bytes=WINDOW_BYTES, limit_bytes=1 << 40, for_s=20)
        assert far.receiver.received_bytes <= limits.MIB


async def test_the_configured_bandwidth_holds() -> None:
    rate = 4 * limits.MIB
    async with far_end(lambda payload: None) as far:
        measured = await measure(
            far.connections,
            keys=KEYS,
            window_bytes=limits.WINDOW_BYTES,
            limit_bytes=1 << 30,
            bandwidth_bytes_per_s=rate,
            for_s=0.5,
        )
    # The bucket begins with one record.
    assert measured.acked_bytes <= rate * 0.6 + limits.MAX_RECORD_BYTES


async def test_a_destination_that_acknowledges_nothing_gives_zero_and_holds_nobody() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        began_s = time.monotonic()
        measured = await measure(
            {0: ours}, keys=KEYS, window_bytes=WINDOW_BYTES, limit_bytes=1 << 30, for_s=FOR_S
        )
    assert measured.acked_bytes == 0
    assert time.monotonic() - began_s < FOR_S + 2


async def test_a_destination_that_hangs_up_ends_it_with_the_cause() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    measured = await measure({0: ours}, keys=KEYS, window_bytes=WINDOW_BYTES, limit_bytes=1 << 30, for_s=20)
    assert measured.acked_bytes == 0
    assert measured.broke


async def test_a_cancelled_measurement_leaves_no_connection() -> None:
    async with far_end(lambda payload: None) as far:
        with anyio.move_on_after(0.05):
            await measure(
                far.connections, keys=KEYS, window_bytes=WINDOW_BYTES, limit_bytes=1 << 40, for_s=20
            )
        assert all(sock.fileno() == -1 for sock in far.connections.values())


async def test_noise_does_not_compress() -> None:
    payloads: list[bytes] = []

    def keep(payload: memoryview) -> None:
        if len(payloads) < 4:
            payloads.append(bytes(payload))

    async with far_end(keep, connections=1) as far:
        await measure(far.connections, keys=KEYS, window_bytes=WINDOW_BYTES, limit_bytes=1 << 20, for_s=5)
    assert len(zlib.compress(payloads[0])) > len(payloads[0])
