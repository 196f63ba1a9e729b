from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from agents import httpd
from agents.httpd import Page, serve_pages

pytestmark = pytest.mark.anyio


def broken() -> Page:
    raise RuntimeError("a bug of ours")


PAGES = {
    "/broken": broken,
    "/metrics": lambda: Page(body=b"figures\n", content_type="text/plain; version=0.0.4"),
    "/healthz": lambda: Page(body=b"draining\n", status=HTTPStatus.SERVICE_UNAVAILABLE),
}


@asynccontextmanager
async def served(timeout_s: float = 5.0) -> AsyncIterator[int]:
    multi = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    port: int = multi.extra(SocketAttribute.local_port)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: serve_pages(multi, PAGES, timeout_s=timeout_s))
        yield port
        tasks.cancel_scope.cancel()


async def rest_of(stream: SocketStream) -> bytes:
    answer = b""
    try:
        while True:
            answer += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return answer


async def ask(port: int, request: bytes, *, is_whole: bool = False) -> bytes:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(request)
        if is_whole:
            await stream.send_eof()
        with anyio.fail_after(5):
            return await rest_of(stream)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def test_a_page_is_answered_with_its_length_and_type() -> None:
    async with served() as port:
        answer = await ask(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 200 OK"
    assert b"Content-Type: text/plain; version=0.0.4" in head
    assert b"Content-Length: 8" in head
    assert b"Connection: close" in head
    assert body == b"figures\n"


async def test_head_is_answered_without_the_body() -> None:
    async with served() as port:
        answer = await ask(port, b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b"Content-Length: 8" in answer


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics?name=x HTTP/1.0", 200),
        (b"GET /healthz HTTP/1.1", 503),
        (b"GET /broken HTTP/1.1", 500),
        (b"GET / HTTP/1.1", 404),
        (b"GET /metrics/../etc/passwd HTTP/1.1", 404),
        (b"POST /metrics HTTP/1.1", 405),
        (b"GET /metrics", 400),
        (b"GET  /metrics HTTP/1.1", 400),
        (b"GET /metrics HTTP/2.0", 400),
        (b"GET http://localhost/metrics HTTP/1.1", 400),
        (b"get /metrics HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    ],
)
async def test_each_request_has_the_status_it_deserves(request_line: bytes, status: int) -> None:
    async with served() as port:
        assert status_of(await ask(port, request_line + b"\r\n\r\n")) == status


async def test_a_head_of_the_limit_is_read_and_one_byte_more_is_refused() -> None:
    start, end = b"GET /metrics HTTP/1.1\r\nX: ", b"\r\n\r\n"
    filling = httpd.MAX_HEAD_BYTES - len(start) - len(end)
    async with served() as port:
        assert status_of(await ask(port, start + b"x" * filling + end)) == 200
        assert status_of(await ask(port, start + b"x" * (filling + 1) + end)) == 431


async def test_a_head_that_ends_early_is_a_bad_request() -> None:
    async with served() as port:
        assert status_of(await ask(port, b"GET /metrics HTTP/1.1\r\n", is_whole=True)) == 400


async def test_a_slow_client_is_told_and_let_go() -> None:
    async with served(timeout_s=0.5) as port:
        assert status_of(await ask(port, b"GET /met")) == 408


async def test_a_client_that_goes_away_harms_nobody() -> None:
    async with served() as port:
        for _ in range(3):
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(b"GET")
        assert status_of(await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")) == 200


async def test_one_connection_too_many_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "MAX_CONNECTIONS", 2)
    async with served() as port:
        held = [await anyio.connect_tcp("127.0.0.1", port) for _ in range(2)]
        assert status_of(await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")) == 503
        for stream in held:
            await stream.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert status_of(await rest_of(stream)) == 200
            await stream.aclose()
        assert status_of(await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")) == 200
