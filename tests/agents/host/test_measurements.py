"""A source with bad intentions measures: it gets one measurement, its bytes and its seconds, and holds nothing."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from agents.api import GetHost, HostView
from agents.host.data import DataListener
from agents.host.measurements import Measurements
from migrate.messages import PROTOCOL, EndMeasure, MeasureEnded, MeasurePath, PathOpened
from tests.agents.host.fleet import ALLOW_ALL, running_fleet
from tests.agents.host.test_garbage import hostile_bundle, hostile_session
from tests.waiting import until
from transport import limits
from transport.errors import PeerGone, PeerMisbehaved, PeerRefused
from transport.hello import say_hello
from transport.seal import Keys

pytestmark = pytest.mark.anyio

SECRET = bytes(range(32))
KEYS = Keys(SECRET)
SESSION = b"s" * 16
CAP = 1 << 20


def asking(**changed: object) -> MeasurePath:
    values: dict[str, object] = {
        "protocol": PROTOCOL,
        "secret": SECRET,
        "connections": 2,
        "window_bytes": 4 << 20,
        **changed,
    }
    return MeasurePath(**values)  # type: ignore[arg-type]


@asynccontextmanager
async def listening(*, ends_s: float = 20.0, limit_bytes: int = CAP) -> AsyncIterator[Measurements]:
    """The destination's part alone, on a real port."""
    with contextlib.closing(DataListener("127.0.0.1", 0)) as data:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(data.serve)
            measurements = Measurements("host-b", data, tasks, ends_s=ends_s, limit_bytes=limit_bytes)
            try:
                yield measurements
            finally:
                await measurements.end_all()
                tasks.cancel_scope.cancel()


def connect(
    opened: PathOpened, slot: int = 0, *, session: bytes | None = None, keys: Keys = KEYS
) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", opened.data_port), timeout=5)
    try:
        say_hello(sock, opened.data_session if session is None else session, slot, keys.hello)
    except BaseException:
        sock.close()
        raise
    sock.settimeout(5)
    return sock


def until_closed(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(65536):
            pass


def noise(count: int, size: int = 64 << 10) -> Callable[[memoryview], int]:
    """A producer of so many payloads."""
    left = [size] * count

    def produce(buffer: memoryview) -> int:
        if not left:
            return 0
        buffer[:size] = os.urandom(size)
        return left.pop()

    return produce


async def test_what_a_source_may_send_ends_with_the_cap() -> None:
    async with listening() as measurements:
        opened = await measurements.begin(SESSION, asking(), "host-a")
        assert opened.limit_bytes == CAP
        bundle = hostile_bundle(opened.data_port, opened.data_session, KEYS)
        with pytest.raises(PeerGone):
            await bundle.send_all(noise(100))
        assert bundle.acked_payload_bytes <= CAP
        await bundle.aclose()
        ended = await measurements.end(SESSION, "host-a")
        # The record that passed the cap is the last that was read.
        assert CAP < ended.received_bytes <= CAP + limits.MAX_RECORD_BYTES


async def test_a_source_that_says_nothing_is_let_go_when_its_time_is_over() -> None:
    async with listening(ends_s=0.3) as measurements:
        opened = await measurements.begin(SESSION, asking(), "host-a")
        with await run_sync(connect, opened) as silent:
            with pytest.raises(PeerRefused, match="host-a"):
                await measurements.begin(b"t" * 16, asking(), "host-c")
            await run_sync(until_closed, silent)

        async def another() -> bool:
            with contextlib.suppress(PeerRefused):
                await measurements.begin(b"t" * 16, asking(), "host-c")
                return True
            return False

        await until(another, "room for the next measurement", within_s=5)


async def test_one_measurement_at_a_time_and_the_next_when_it_has_ended() -> None:
    async with listening() as measurements:
        await measurements.begin(SESSION, asking(), "host-a")
        for session, peer in ((SESSION, "host-a"), (b"t" * 16, "host-a"), (b"t" * 16, "host-c")):
            with pytest.raises(PeerRefused) as refused:
                await measurements.begin(session, asking(), peer)
            assert refused.value.code == "busy"
        # The port is told all the same: a mere connect disturbs no measurement.
        told = await measurements.begin(b"t" * 16, asking(connections=0), "host-c")
        assert (told.connections, told.data_session, told.limit_bytes) == (0, b"", 0)
        assert await measurements.end(SESSION, "host-a") == MeasureEnded(received_bytes=0)
        await measurements.begin(b"t" * 16, asking(), "host-c")


async def test_nobody_ends_the_measurement_of_another_peer() -> None:
    async with listening() as measurements:
        opened = await measurements.begin(SESSION, asking(), "host-a")
        assert await measurements.end(SESSION, "host-c") == MeasureEnded(received_bytes=0)
        await measurements.end_all(of="host-c")
        with await run_sync(connect, opened):
            pass
        await measurements.end_all(of="host-a")
        with pytest.raises((PeerGone, PeerMisbehaved)):
            await run_sync(connect, opened)


async def test_connections_need_the_key_and_are_as_many_as_agreed() -> None:
    async with listening() as measurements:
        opened = await measurements.begin(SESSION, asking(connections=1), "host-a")
        assert opened.connections == 1
        for session, keys in ((opened.data_session, Keys(bytes(32))), (SESSION, KEYS)):
            with pytest.raises((PeerGone, PeerMisbehaved)):
                await run_sync(functools.partial(connect, opened, session=session, keys=keys))
        with await run_sync(connect, opened), await run_sync(connect, opened, 1) as second:
            await run_sync(until_closed, second)


async def test_a_source_gets_no_more_connections_than_are_lent() -> None:
    async with listening() as measurements:
        opened = await measurements.begin(
            SESSION, asking(connections=1 << 40, window_bytes=1 << 60), "host-a"
        )
        assert opened.connections == limits.MEASURE_CONNECTIONS


@pytest.mark.parametrize(
    "lie", [{"secret": b""}, {"secret": bytes(33)}, {"connections": -1}, {"protocol": PROTOCOL + 1}]
)
async def test_requests_that_make_no_sense_are_refused(lie: dict[str, object]) -> None:
    async with listening() as measurements:
        with pytest.raises(PeerRefused):
            await measurements.begin(SESSION, asking(**lie), "host-a")
        await measurements.begin(SESSION, asking(), "host-a")


async def test_a_measurement_ends_with_its_control_connection(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        async with hostile_session(fleet) as (session, _):
            opened = await session.call(asking(), timeout_s=5)
            assert isinstance(opened, PathOpened)
            data = await run_sync(connect, opened)
        with data:
            await run_sync(until_closed, data)
        async with hostile_session(fleet) as (session, _):
            assert isinstance(await session.call(asking(), timeout_s=5), PathOpened)
            assert isinstance(await session.call(EndMeasure(), timeout_s=5), MeasureEnded)
        assert isinstance(await fleet.ask("host-a", GetHost()), HostView)


async def test_who_may_send_no_guests_may_not_measure(folder: Path) -> None:
    rules = ALLOW_ALL.replace('agents = ["*"]', 'agents = ["host-a"]')
    async with running_fleet(folder, rules=rules) as fleet, hostile_session(fleet) as (session, _):
        for connections in (0, 1):
            with pytest.raises(PeerRefused, match="host-b may not send"):
                await session.call(asking(connections=connections), timeout_s=5)


async def test_an_agent_that_ends_waits_for_no_measurement(folder: Path) -> None:
    async with running_fleet(folder) as fleet, hostile_session(fleet) as (session, _):
        opened = await session.call(asking(), timeout_s=5)
        assert isinstance(opened, PathOpened)
        fleet.agents["host-a"].ask_to_end()
        with anyio.fail_after(limits.MEASURE_ENDS_S / 2):
            await fleet.has_ended["host-a"].wait()
