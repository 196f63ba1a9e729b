"""How much a path carries: payloads of noise through a SendBundle for a second, thrown away at the other end.

Tasks: `measure` has one that ends it in time, beside those of `SendBundle.send_all`; both end before it returns.
Law: payloads are opaque noise. Ends after `limits.MEASURE_S` or `limits.MEASURE_BYTES`, whichever comes first.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import anyio

from transport import limits
from transport.bundle import SendBundle
from transport.errors import PeerGone
from transport.frames import HEADER_BYTES, TAG_BYTES
from transport.seal import Keys
from transport.tcpinfo import TcpFacts, tcp_facts, worst_of

__all__ = ["Measured", "measure"]

# First payloads are small, so that a link of 1 Mbit/s has acknowledged some within the second; then each is a 16th of
# what was acknowledged, up to what pages travel in.
_FIRST_PAYLOAD_BYTES: Final = 16 * limits.KIB
_GROWTH: Final = 16
# What is under way when the second is over may still arrive for so long, which counts no more: a connection that ends
# between two records is in nobody's log. On a slow link it is cut.
_GRACE_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`acked_bytes` of payload were acknowledged in `took_s`. `broke` says why it ended before its time, if it did."""

    acked_bytes: int
    took_s: float
    tcp: TcpFacts
    broke: str = ""


class _Noise:
    """A producer of payloads that nothing can compress, until it has given what the destination takes."""

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes = limit_bytes
        self._noise = memoryview(
            os.urandom(64 * limits.KIB) * (limits.MAX_PAYLOAD_DATA_BYTES // (64 * limits.KIB))
        )
        self._lock = threading.Lock()
        self.bundle: SendBundle | None = None
        self.is_stopped = False

    def __call__(self, buffer: memoryview) -> int:
        acked_bytes = self.bundle.acked_payload_bytes if self.bundle is not None else 0
        size = min(max(acked_bytes // _GROWTH, _FIRST_PAYLOAD_BYTES), len(self._noise), len(buffer))
        with self._lock:
            size = min(size, self._left_bytes - HEADER_BYTES - TAG_BYTES)
            if size <= 0 or self.is_stopped:
                return 0
            self._left_bytes -= size + HEADER_BYTES + TAG_BYTES
        buffer[:size] = self._noise[:size]
        return size


async def measure(
    connections: Mapping[int, socket.socket],
    *,
    keys: Keys,
    window_bytes: int,
    limit_bytes: int,
    bandwidth_bytes_per_s: float | None = None,
    for_s: float = limits.MEASURE_S,
) -> Measured:
    """Send noise over connections on which the hello has passed, by slot; they are closed when this returns.

    A connection that breaks stays broken. Never fails for the network's sake: what was acknowledged is the answer.
    """
    unused = dict(connections)

    async def dial(slot: int) -> socket.socket:
        if slot not in unused:
            raise PeerGone("a measurement dials no connection again")
        return unused.pop(slot)

    bundle = SendBundle(
        dial,
        keys=keys,
        connections=len(connections),
        window_bytes=window_bytes,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        outage_s=0.0,
        dead_peer_s=for_s + 1.0,
    )
    noise = _Noise(min(limit_bytes, limits.MEASURE_BYTES))
    noise.bundle = bundle
    began_s = time.monotonic()
    taken: Measured | None = None

    def take(broke: str = "") -> Measured:
        return Measured(
            acked_bytes=bundle.acked_payload_bytes,
            took_s=max(time.monotonic() - began_s, 1e-6),
            tcp=worst_of(tcp_facts(sock) for sock in connections.values()),
            broke=broke,
        )

    try:
        with anyio.CancelScope() as sending:

            async def end_in_time() -> None:
                nonlocal taken
                await anyio.sleep(for_s)
                # Before the connections are closed: the kernel forgets what it knows of them.
                taken = take()
                noise.is_stopped = True
                await anyio.sleep(_GRACE_S)
                sending.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(end_in_time)
                try:
                    await bundle.send_all(noise)
                except PeerGone as exc:
                    taken = taken or take(str(exc))
                taken = taken or take()
                tasks.cancel_scope.cancel()
    finally:
        await bundle.aclose()
        for sock in unused.values():
            sock.close()
    return taken or take()
