"""The network in front of one agent, as tests have it: it counts what passes, breaks at the K-th piece, and swallows.

Law: knows bytes, neither pages nor messages. It listens on another loopback address at the agent's own ports, because
data connections go to the address that the control connection went to.

Tasks: one per listener and two per connection, all in `serve`, which ends them when it is cancelled.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import anyio
import anyio.abc

from agents.demo.proxy import Proxy
from transport import limits

__all__ = ["FRONTS", "Network", "networks"]

# Where each host's peers find it.
FRONTS: Final = {"host-a": "127.0.0.2", "host-b": "127.0.0.3"}


class Network(Proxy):
    """What lies between an agent and its peers.

    `pieces` counts everything that came to either side; at number `cut_at` (from 0) that piece is half delivered or not
    at all, and every connection is reset. At number `stall_at` it is held instead, with all that follows, until `mend`.
    """

    # A whole record, if it comes at once: a piece is what an end did, and not what a buffer held.
    chunk_bytes = limits.MAX_RECORD_BYTES

    def __init__(self, target_host: str) -> None:
        super().__init__(target_host)
        self._flows = anyio.Event()
        self._flows.set()
        self.pieces = 0
        self.cut_at: int | None = None
        self.stall_at: int | None = None

    @property
    def is_stalled(self) -> bool:
        """Whether nothing arrives just now."""
        return not self._flows.is_set()

    def stall(self) -> None:
        """From now on nothing arrives, in either direction, and nobody is told."""
        self._flows = anyio.Event()

    def mend(self) -> None:
        """What was held arrives, and everything flows again."""
        self._flows.set()

    async def serve(self, listener: anyio.abc.Listener[anyio.abc.SocketStream], port: int) -> None:
        """Forward from this listener to a port of the agent, until cancelled."""
        await listener.serve(functools.partial(self._serve_when_it_flows, port))

    async def _serve_when_it_flows(self, port: int, near: anyio.abc.SocketStream) -> None:
        async with near:
            await self._flows.wait()
            await self.serve_connection(port, near)

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        """Count what came, and let it through unless it is the piece that something happens at."""
        number, self.pieces = self.pieces, self.pieces + 1
        if number == self.stall_at:
            self.stall()
        await self._flows.wait()
        if number == self.cut_at:
            # Odd ones vanish whole, even ones arrive in part: both happen to real ones.
            if number % 2 == 0:
                await sink.send(chunk[: len(chunk) // 2])
            self.cut()
            return False
        await sink.send(chunk)
        return True


@asynccontextmanager
async def networks(ports: dict[str, tuple[int, ...]]) -> AsyncIterator[dict[str, Network]]:
    """Put a network in front of each host, whose ports these are."""
    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        made: dict[str, Network] = {}
        for host, its_ports in ports.items():
            network = made[host] = Network("127.0.0.1")
            for port in its_ports:
                listener = await stack.enter_async_context(
                    await anyio.create_tcp_listener(local_host=FRONTS[host], local_port=port)
                )
                tasks.start_soon(network.serve, listener, port)
        yield made
        tasks.cancel_scope.cancel()
