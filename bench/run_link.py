"""How much of plain TCP's speed is left when records are sealed, numbered and acknowledged?

Two processes on loopback, 2 connections, 1 MiB payloads, nothing compressed: SendBundle to ReceiveBundle, against
the same bytes through two plain TCP connections with a thread at each end. Runs alternate, so that both meet the
same neighbours; the answer is the median of the ratios of pairs.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final

import anyio
import anyio.to_thread

from transport import limits
from transport.bundle import ReceiveBundle, SendBundle
from transport.errors import TransportError
from transport.hello import answer_hello, say_hello
from transport.seal import Keys

QUESTION: Final = "How much of the speed of plain TCP is left over 2 sealed connections on loopback?"

GOAL_RATIO: Final = 0.5

_CONNECTIONS: Final = 2
_PAYLOAD_BYTES: Final = limits.MIB
_SESSION_ID: Final = b"bench link 16 by"
_KEYS: Final = Keys(b"a secret for the bench, 32 bytes")
_READY_TIMEOUT_S: Final = 20.0

# Opens a listener's port, tells it, and takes everything that comes until all connections have ended.
_Sink = Callable[[Connection], None]


def run(smoke: bool) -> dict[str, object]:
    """Give medians in bytes per second and the ratio; see GOAL_RATIO."""
    rounds, payloads = (1, 8) if smoke else (7, 512)
    plain_bytes_per_s: list[float] = []
    sealed_bytes_per_s: list[float] = []
    for _ in range(rounds):
        plain_bytes_per_s.append(_measured(_plain_sink, _send_plain, payloads))
        sealed_bytes_per_s.append(_measured(_sealed_sink, _send_sealed, payloads))
    pairs = zip(sealed_bytes_per_s, plain_bytes_per_s, strict=True)
    return {
        "connections": _CONNECTIONS,
        "payload_bytes": _PAYLOAD_BYTES,
        "sent_bytes": payloads * _PAYLOAD_BYTES,
        "rounds": rounds,
        "plain_bytes_per_s": statistics.median(plain_bytes_per_s),
        "sealed_bytes_per_s": statistics.median(sealed_bytes_per_s),
        "sealed_to_plain_ratio": statistics.median(sealed / plain for sealed, plain in pairs),
        "goal_ratio": GOAL_RATIO,
    }


def _measured(sink: _Sink, send: Callable[[int, int], float], payloads: int) -> float:
    """Start a sink in a process of its own, send to it, and give bytes per second."""
    # Spawned, not forked: a fork would share this process's threads' locks, and its memory copy-on-write.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=sink, args=(theirs,))
    process.start()
    try:
        if not ours.poll(_READY_TIMEOUT_S):
            raise RuntimeError(f"the receiving process was not ready within {_READY_TIMEOUT_S:g} s")
        return payloads * _PAYLOAD_BYTES / send(ours.recv(), payloads)
    finally:
        process.join(_READY_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
        ours.close()
        theirs.close()


def _serve(ready: Connection, one: Callable[[socket.socket], None]) -> None:
    """Tell the port and run `one` on each connection, in a thread of its own from its first byte on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ready.send(listening.getsockname()[1])
        _in_threads([lambda: one(listening.accept()[0])] * _CONNECTIONS)


def _in_threads(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _plain_sink(ready: Connection) -> None:
    def drain(sock: socket.socket) -> None:
        with sock:
            buffer = bytearray(_PAYLOAD_BYTES)
            while sock.recv_into(buffer):
                pass
            # The sender's clock stops when this end has everything, as an acknowledgement would say.
            sock.sendall(b"\x00")

    _serve(ready, drain)


def _send_plain(port: int, payloads: int) -> float:
    payload = os.urandom(_PAYLOAD_BYTES)

    def pour(sock: socket.socket) -> None:
        with sock:
            for _ in range(payloads // _CONNECTIONS):
                sock.sendall(payload)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)

    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(_CONNECTIONS)]
    begun_s = time.perf_counter()
    _in_threads([functools.partial(pour, sock) for sock in sockets])
    return time.perf_counter() - begun_s


def _sealed_sink(ready: Connection) -> None:
    bundle = ReceiveBundle(keys=_KEYS, consumer=lambda payload: None)

    def serve(sock: socket.socket) -> None:
        answer_hello(sock, {_SESSION_ID: _KEYS.hello}.get)
        try:
            bundle.serve(sock)
        except TransportError:
            # The sender is done and has closed: its figures are what counts.
            return

    _serve(ready, serve)


def _send_sealed(port: int, payloads: int) -> float:
    return anyio.run(_send_sealed_async, port, payloads)


async def _send_sealed_async(port: int, payloads: int) -> float:
    payload = os.urandom(_PAYLOAD_BYTES)
    left = payloads
    lock = threading.Lock()

    def produce(buffer: memoryview) -> int:
        nonlocal left
        with lock:
            if left == 0:
                return 0
            left -= 1
        # Each thread's buffer is filled once, as the plain side sends one payload again and again.
        if buffer[:64] != payload[:64]:
            buffer[:_PAYLOAD_BYTES] = payload
        return _PAYLOAD_BYTES

    def dial_blocking(slot: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port))
        say_hello(sock, _SESSION_ID, slot, _KEYS.hello)
        return sock

    sockets = [await anyio.to_thread.run_sync(dial_blocking, slot) for slot in range(_CONNECTIONS)]

    async def dial(slot: int) -> socket.socket:
        return sockets[slot]

    bundle = SendBundle(dial, keys=_KEYS, connections=_CONNECTIONS)
    begun_s = time.perf_counter()
    await bundle.send_all(produce)
    seconds = time.perf_counter() - begun_s
    await bundle.aclose()
    return seconds
