"""Ways from host-a to host-b that are slow, long, or let nothing through."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc

from agents.demo.proxy import Proxy
from tests.agents.host.fleet import Fleet
from tests.agents.host.network import FRONTS
from tests.waiting import delay

__all__ = ["FRONT", "Delayed", "HangsUp", "OnlyGreetings", "Slow", "through"]

FRONT = FRONTS["host-b"]


class Slow(Proxy):
    """A link of so many bytes a second, all connections together; `carried` is when how much of them had passed.

    A process that gets no CPU for a while makes up for at most LATE_S of it: what really passed is what counts.
    """

    LATE_S = 0.2

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__("127.0.0.1")
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self.carried: list[tuple[float, int]] = []

    @property
    def achieved_bytes_per_s(self) -> float:
        began_s, ended_s = self.carried[0][0], self.carried[-1][0]
        return sum(size for _, size in self.carried) / (ended_s - began_s)

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        free_at_s = max(self._free_at_s, anyio.current_time() - self.LATE_S)
        self._free_at_s = free_at_s + len(chunk) / self._bytes_per_s
        await anyio.sleep_until(self._free_at_s)
        await sink.send(chunk)
        self.carried.append((anyio.current_time(), len(chunk)))
        return True


class OnlyGreetings(Proxy):
    """A link on which nothing larger than a handshake arrives: as where large packets are dropped in silence."""

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        if len(chunk) <= 256:
            await sink.send(chunk)
        return True


class Delayed(Proxy):
    """A long way: everything takes so long in either direction."""

    def __init__(self, delay_s: float) -> None:
        super().__init__("127.0.0.1")
        self._delay_s = delay_s

    async def carry(self, chunk: bytes, sink: anyio.abc.SocketStream) -> bool:
        await delay(self._delay_s)
        await sink.send(chunk)
        return True


class HangsUp(Proxy):
    """Somebody else at that port, who has nothing to say."""

    async def serve_connection(self, port: int, near: anyio.abc.SocketStream) -> None:
        await near.aclose()


@asynccontextmanager
async def through(fleet: Fleet, data: Proxy | None, control: Proxy | None = None) -> AsyncIterator[None]:
    """Let host-a find host-b at its front: the data port through `data` or not at all."""
    async with contextlib.AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        ways: list[tuple[Proxy, int]] = [(control or Proxy("127.0.0.1"), fleet.control_ports["host-b"])]
        if data is not None:
            ways.append((data, fleet.data_ports["host-b"]))
        for proxy, port in ways:
            listener = await stack.enter_async_context(
                await anyio.create_tcp_listener(local_host=FRONT, local_port=port)
            )

            async def serve(
                listener: anyio.abc.Listener[anyio.abc.SocketStream] = listener,
                proxy: Proxy = proxy,
                port: int = port,
            ) -> None:
                async def serve_one(near: anyio.abc.SocketStream) -> None:
                    await proxy.serve_connection(port, near)

                await listener.serve(serve_one)

            tasks.start_soon(serve)
        yield
        tasks.cancel_scope.cancel()
