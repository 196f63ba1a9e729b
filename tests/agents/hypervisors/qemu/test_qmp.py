"""QMP against a server that the test scripts, line by line: what a good QEMU says, and what a bad one may."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from agents.hypervisors.qemu import qmp as qmp_module
from agents.hypervisors.qemu.errors import QemuGone, QmpFailed
from agents.hypervisors.qemu.qmp import Json, Qmp, event_time_s, field_of

pytestmark = pytest.mark.anyio

GREETING: Json = {"QMP": {"version": {}, "capabilities": []}}
Answer = Callable[[dict[str, object], anyio.abc.SocketStream], Awaitable[None]]


async def say(stream: anyio.abc.SocketStream, *messages: object) -> None:
    for message in messages:
        await stream.send(json.dumps(message).encode() + b"\r\n")


async def until_ended(under_way: set[object]) -> None:
    """A client that has closed lets its server end by itself."""
    for _ in range(100_000):
        if not under_way:
            return
        await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def serving(folder: Path, answer: Answer, *greeting: object) -> AsyncIterator[Path]:
    """A monitor that shakes hands, and then gives each command to `answer`."""
    path = folder / "qmp"
    under_way: set[object] = set()

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            under_way.add(stream)
            lines = BufferedByteReceiveStream(stream)
            try:
                await say(stream, *(greeting or (GREETING,)))
                while True:
                    request = json.loads(await lines.receive_until(b"\n", 1 << 20))
                    if request["execute"] == "qmp_capabilities":
                        await say(stream, {"return": {}, "id": request["id"]})
                    else:
                        await answer(request, stream)
            except (anyio.IncompleteRead, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            finally:
                under_way.discard(stream)

    listener = await anyio.create_unix_listener(path)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield path
        with anyio.fail_after(5):
            await until_ended(under_way)
        tasks.cancel_scope.cancel()


async def echo(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
    await say(stream, {"return": request.get("arguments", {}), "id": request["id"]})


@asynccontextmanager
async def connected(folder: Path, answer: Answer = echo) -> AsyncIterator[Qmp]:
    async with serving(folder, answer) as path:
        qmp = await Qmp.connect(path)
        try:
            yield qmp
        finally:
            await qmp.aclose()


async def test_a_command_gets_its_own_reply(tmp_path: Path) -> None:
    async with connected(tmp_path) as qmp:
        assert await qmp.execute("first", {"a": 1}) == {"a": 1}
        assert await qmp.execute("second") == {}
        assert qmp.peer_pid == os.getpid()


async def test_tasks_that_share_a_connection_get_their_own_replies(tmp_path: Path) -> None:
    async with connected(tmp_path) as qmp, anyio.create_task_group() as tasks:

        async def ask(number: int) -> None:
            assert await qmp.execute("x", {"n": number}) == {"n": number}

        for number in range(20):
            tasks.start_soon(ask, number)


async def test_an_error_names_the_command_and_what_qemu_said(tmp_path: Path) -> None:
    async def refuse(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
        error = {"class": "CommandNotFound", "desc": "The command x has not been found"}
        await say(stream, {"error": error, "id": request["id"]})

    async with connected(tmp_path, refuse) as qmp:
        with pytest.raises(QmpFailed, match="QEMU refuses x: The command x has not been found") as failed:
            await qmp.execute("x")
        assert failed.value.kind == "CommandNotFound"


async def test_events_wait_for_who_wants_them(tmp_path: Path) -> None:
    stop = {"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 500_000}}

    async def with_events(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
        await say(stream, {"event": "MIGRATION", "data": {"status": "setup"}}, stop)
        await say(stream, {"return": {}, "id": request["id"]})
        await say(stream, {"event": "MIGRATION", "data": {"status": "completed"}})

    async with connected(tmp_path, with_events) as qmp:
        await qmp.execute("migrate")
        done = await qmp.wait_event("MIGRATION", lambda data: data.get("status") == "completed")
        assert field_of(done, "data", "status") == "completed"
        assert event_time_s(await qmp.wait_event("STOP")) == 7.5
        qmp.forget_events()
        with pytest.raises(QemuGone, match="did not tell MIGRATION"):
            await qmp.wait_event("MIGRATION", timeout_s=0.01)


async def test_a_reply_that_came_too_late_is_nobody_elses(tmp_path: Path) -> None:
    late: list[object] = []

    async def slow_first(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
        if not late:
            late.append({"return": "late", "id": request["id"]})
            return
        await say(stream, late[0], {"return": "mine", "id": request["id"]})

    async with connected(tmp_path, slow_first) as qmp:
        with pytest.raises(QemuGone, match="did not answer x within"):
            await qmp.execute("x", timeout_s=0.05)
        assert await qmp.execute("y") == "mine"


async def test_replies_to_the_client_before_are_nobodys(tmp_path: Path) -> None:
    """A QEMU that was slow to start answers who gave up, and its socket is the next one's by then."""
    numbers: list[object] = []

    async def remember(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
        await say(stream, *({"return": "before", "id": number} for number in numbers))
        numbers.append(request["id"])
        await echo(request, stream)

    before = ({"return": {}, "id": 1}, {"event": "RESUME"}, {"error": {"class": "GenericError"}})
    async with serving(tmp_path, remember, *before, GREETING) as path:
        for _ in range(3):
            qmp = await Qmp.connect(path)
            assert await qmp.execute("x") == {}
            await qmp.aclose()
    assert len(set(numbers)) == 3


async def test_a_cancelled_command_leaves_the_connection_usable(tmp_path: Path) -> None:
    async def slow_first(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
        if request["execute"] != "x":
            await echo(request, stream)

    async with connected(tmp_path, slow_first) as qmp:
        with anyio.move_on_after(0.05):
            await qmp.execute("x")
        assert await qmp.execute("y") == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "does not speak JSON"),
        (b"[1, 2]\n", "something else than objects"),
        (b'{"return": {}}\n', "without an id"),
        (b"[" * 100_000 + b"\n", "does not speak JSON"),
    ],
)
async def test_nonsense_is_said_to_be_nonsense(tmp_path: Path, line: bytes, words: str) -> None:
    async def nonsense(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
        await stream.send(line)

    async with connected(tmp_path, nonsense) as qmp:
        with pytest.raises(QmpFailed, match=words):
            await qmp.execute("x")


async def test_a_line_without_an_end_is_not_kept_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp_module, "MAX_LINE_BYTES", 100_000)

    async def endless(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
        while True:
            await stream.send(b"x" * 10_000)

    async with connected(tmp_path, endless) as qmp:
        with pytest.raises(QmpFailed, match="without an end"):
            await qmp.execute("x")


async def test_a_qemu_that_ends_is_gone(tmp_path: Path) -> None:
    async def end(request: dict[str, object], stream: anyio.abc.SocketStream) -> None:
        await stream.aclose()

    async with connected(tmp_path, end) as qmp:
        with pytest.raises(QemuGone, match="has ended"):
            await qmp.execute("x")
        with pytest.raises(QemuGone):
            await qmp.execute("y")


async def test_a_socket_without_a_qemu_says_so(tmp_path: Path) -> None:
    with pytest.raises(QemuGone, match="no QEMU listens"):
        await Qmp.connect(tmp_path / "none")


async def test_another_server_is_not_taken_for_a_qemu(tmp_path: Path) -> None:
    async with serving(tmp_path, echo, {"SSH": "2.0"}) as path:
        with pytest.raises(QmpFailed, match="no QMP monitor"):
            await Qmp.connect(path)


async def test_a_monitor_that_another_client_holds_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(1)
        with pytest.raises(QemuGone, match="another client holds it"):
            await Qmp.connect(tmp_path / "qmp", timeout_s=0.05)


def test_a_path_into_a_reply_ends_where_the_reply_does() -> None:
    reply: Json = {"a": [{"b": 3}]}
    assert field_of(reply, "a", 0, "b") == 3
    assert field_of(reply, "a", 1, "b") is None
    assert field_of(reply, "a", "b") is None
    assert field_of(reply, "x") is None
