"""A few pages over HTTP/1.1 on a loopback port: /metrics and /healthz.

Law: GET and HEAD, one request a connection, no body in, nothing secret out. Everything a client can make us keep
is bounded: 8 KiB of head, 5 s for all of it, 32 connections at once.

Why our own: `prometheus_client` serves from a thread per request without a limit on either, and the small server
libraries that run on both event loops (hypercorn with h11, h2 and wsproto) weigh more than this file's one regular
expression. Source: RFC 9112 (3 request line, 9.6 tear-down).

Tasks: one per connection, in the task group of `serve_pages`, which ends them when it is cancelled.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import anyio
import anyio.abc
import anyio.to_thread

__all__ = ["Page", "serve_pages"]

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 8 << 10
# A scraper on this host sends its head at once; whoever takes longer holds one of the 32 places.
TIMEOUT_S: Final = 5.0
MAX_CONNECTIONS: Final = 32
_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.[01]\r\n", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What is answered for one path."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


# Called in a worker thread, for each request.
PageMaker = Callable[[], Page]


async def serve_pages(
    listener: anyio.abc.Listener[anyio.abc.SocketStream],
    pages: Mapping[str, PageMaker],
    *,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Answer requests until cancelled; the listener is closed then.

    `pages` has the maker for each path, without the query.
    """
    open_connections = 0

    async def serve_one(stream: anyio.abc.ByteStream) -> None:
        nonlocal open_connections
        is_full = open_connections >= MAX_CONNECTIONS
        open_connections += 1
        try:
            async with stream:
                # The client went, or was too slow even to take the answer: nobody is left to tell.
                with (
                    suppress(anyio.BrokenResourceError, anyio.ClosedResourceError),
                    anyio.move_on_after(timeout_s),
                ):
                    if is_full:
                        await stream.send(_error(HTTPStatus.SERVICE_UNAVAILABLE))
                    else:
                        await stream.send(await _answer(stream, pages, timeout_s))
        finally:
            open_connections -= 1

    async with listener:
        await listener.serve(serve_one)


async def _answer(stream: anyio.abc.ByteStream, pages: Mapping[str, PageMaker], timeout_s: float) -> bytes:
    head = b""
    # A part of the time is left for saying that it is over.
    with anyio.move_on_after(timeout_s * 0.8) as waiting:
        while b"\r\n\r\n" not in head:
            if len(head) >= MAX_HEAD_BYTES:
                return _error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            try:
                head += await stream.receive(MAX_HEAD_BYTES - len(head))
            except anyio.EndOfStream:
                return _error(HTTPStatus.BAD_REQUEST)
    if waiting.cancelled_caught:
        return _error(HTTPStatus.REQUEST_TIMEOUT)
    request = _REQUEST_LINE.match(head)
    if request is None:
        return _error(HTTPStatus.BAD_REQUEST)
    method, target = request[1], request[2].decode("ascii")
    if method not in (b"GET", b"HEAD"):
        return _error(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD\r\n")
    make_page = pages.get(target.split("?", 1)[0])
    if make_page is None:
        return _error(HTTPStatus.NOT_FOUND)
    try:
        page = await anyio.to_thread.run_sync(make_page)
    except Exception:
        # The task's edge: a page that cannot be made is our bug, and no reason to end the agent.
        _log.exception("page failed")
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR)
    return _response(page, has_body=method == b"GET")


def _error(status: HTTPStatus, more: str = "") -> bytes:
    return _response(Page(status=status, body=f"{status.phrase}\n".encode()), more=more)


def _response(page: Page, *, has_body: bool = True, more: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}\r\n"
        f"Content-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\n"
        f"Cache-Control: no-store\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + (page.body if has_body else b"")
