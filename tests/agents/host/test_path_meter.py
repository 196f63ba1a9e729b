"""What a destination may answer to a source that measures: whatever it says, the source has facts and no error."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from agents.host.path import PINGS, PathMeter
from migrate.inspection import Asker
from migrate.messages import EndMeasure, MeasureEnded, MeasurePath, PathOpened, Ping, Pong
from transport.errors import PeerGone, PeerRefused

pytestmark = pytest.mark.anyio


class Destination:
    """`migrate.ports.Caller` that leads to a function."""

    def __init__(self, answer: Callable[[MeasurePath], object]) -> None:
        self._answer = answer
        self.asked: list[object] = []

    async def call(self, request: object, *, timeout_s: float) -> object:
        await anyio.lowlevel.checkpoint()
        self.asked.append(request)
        match request:
            case Ping():
                return Pong(received_bytes=0, failure=None)
            case EndMeasure():
                return MeasureEnded(received_bytes=0)
            case MeasurePath():
                answer = self._answer(request)
                if isinstance(answer, Exception):
                    raise answer
                return answer
        raise AssertionError(request)


def meter() -> PathMeter:
    return PathMeter(connections=2, window_bytes=4 << 20, bandwidth_bytes_per_s=None, reach_s=0.3)


def opened(**changed: object) -> PathOpened:
    values: dict[str, object] = {
        "data_port": 1,
        "data_session": b"s" * 16,
        "connections": 1,
        "limit_bytes": 1 << 20,
        **changed,
    }
    return PathOpened(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "lie",
    [
        {"data_port": 0},
        {"data_port": -1},
        {"data_port": 65536},
        {"data_port": 1 << 62},
        {"data_session": b""},
        {"connections": 0},
        {"connections": 3},
        {"connections": -(1 << 62)},
    ],
)
async def test_a_destination_that_answers_nonsense_gives_facts_and_no_error(lie: dict[str, object]) -> None:
    destination = Destination(lambda request: opened(**lie))
    path = await meter().look(Asker(destination, 5), "127.0.0.1", measures=True)
    assert path.data_error
    assert path.goodput_bytes_per_s is None
    assert path.unmeasured
    assert path.ping_s is not None
    assert len(destination.asked) == PINGS + 2


@pytest.mark.parametrize("failure", [PeerRefused("draining", "host-b ends"), PeerGone("host-b ends")])
async def test_a_destination_that_opens_nothing_says_why(failure: Exception) -> None:
    path = await meter().look(Asker(Destination(lambda request: failure), 5), "127.0.0.1", measures=True)
    assert (path.data_port, path.data_error, path.unmeasured) == (0, "host-b ends", "host-b ends")


async def test_a_busy_destination_is_still_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer(request: MeasurePath) -> object:
            if request.connections:
                return PeerRefused("busy", "host-b measures the path from host-c just now")
            return opened(data_port=port, data_session=b"", connections=0, limit_bytes=0)

        async with anyio.create_task_group() as tasks:

            def greet() -> None:
                with server.accept()[0] as sock:
                    sock.sendall(bytes(16))

            tasks.start_soon(anyio.to_thread.run_sync, greet)
            path = await meter().look(Asker(Destination(answer), 5), "127.0.0.1", measures=True)
    assert path.data_error == ""
    assert path.rtt_s
    assert "host-c" in path.unmeasured


async def test_a_port_that_says_nothing_ends_within_its_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        destination = Destination(lambda request: opened(data_port=server.getsockname()[1]))
        began_s = time.monotonic()
        path = await meter().look(Asker(destination, 5), "127.0.0.1", measures=True)
    assert path.data_error
    assert path.goodput_bytes_per_s is None
    assert time.monotonic() - began_s < 5
    assert isinstance(destination.asked[-1], EndMeasure)
