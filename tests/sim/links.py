"""The network of a world: links that break, and the data plane over them.

Law: nothing is lost or doubled by a link that the real data plane would not lose or double: a payload that was under
way when a link broke is sent again, whether it has arrived or not.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import anyio

from migrate.ports import PayloadConsumer
from tests.dataplane import Applied, Carrier
from tests.faults import FusedStream
from tests.sim.faults import OUTAGE_S
from tests.sim.lives import Life, step
from transport.errors import PeerGone

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["LINK_BYTES_PER_S", "Link", "SimReceiver", "SimSender"]

# What a link carries between nothing and a slow afternoon; the guest's RAM compresses to some KB a round.
LINK_BYTES_PER_S: Final = (3e2, 3e4)


class Link:
    """The network between two hosts. `broken` is set while it is down."""

    def __init__(self) -> None:
        self.broken = anyio.Event()
        self.mended = anyio.Event()
        self.mended.set()
        self.streams: list[FusedStream] = []

    @property
    def is_down(self) -> bool:
        return self.broken.is_set()

    def cut(self) -> None:
        self.broken.set()
        self.mended = anyio.Event()
        for stream in self.streams:
            stream.cut()
        self.streams.clear()

    def mend(self) -> None:
        self.broken = anyio.Event()
        self.mended.set()


class SimReceiver:
    """The destination's end of the data plane: a port that goes with the agent that opened it."""

    failure: Exception | None = None

    def __init__(self, world: World, life: Life | None, consumer: PayloadConsumer) -> None:
        self.received_bytes = 0
        self.data_port = world.open_port(self)
        self._world = world
        self._life = life
        self._consumer = consumer
        self._applied = Applied()

    @property
    def is_open(self) -> bool:
        return self.data_port in self._world.ports and not (self._life is not None and self._life.is_over)

    def take(self, number: int, payload: memoryview) -> None:
        self.received_bytes += len(payload)
        if self._applied.is_new(number):
            self._consumer(payload)

    async def await_applied(self, records: int, within_s: float) -> bool:
        step()
        return await self._applied.wait_for(records, within_s)

    async def aclose(self) -> None:
        step()
        self._world.ports.pop(self.data_port, None)


class SimSender(Carrier):
    """The data plane: waits for a link or a peer that is away, and gives up after OUTAGE_S, as the real one does."""

    def __init__(
        self, receiver: SimReceiver | None, link: Link, bytes_per_s: float, rng: random.Random
    ) -> None:
        super().__init__()
        self.wire_bytes = 0
        self.acked_payload_bytes = 0
        self.resent_bytes = 0
        self.link_breaks = 0
        self.send_wait_s = 0.0
        self._receiver = receiver
        self._link = link
        self._bytes_per_s = bytes_per_s
        self._rng = rng
        self._cap: float | None = None
        self._lifted = anyio.Event()

    async def carry(self, number: int, payload: memoryview) -> None:
        step()
        size = len(payload)
        while not (await self._arrives(size) and self._take(number, payload)):
            # It may have arrived before the link broke; either way it is sent again.
            self.link_breaks += 1
            self.resent_bytes += size
            if self._rng.random() < 0.5:
                self._take(number, payload)
        self.acked_payload_bytes += size

    async def _arrives(self, size: int) -> bool:
        await self._wait_for_link()
        while (rate := self._rate()) <= 0:
            self._lifted = anyio.Event()
            await self._lifted.wait()
        self.wire_bytes += size
        with anyio.move_on_after(size / rate) as under_way:
            await self._link.broken.wait()
        step()
        return under_way.cancelled_caught

    def _rate(self) -> float:
        return self._bytes_per_s if self._cap is None else min(self._bytes_per_s, self._cap)

    def _take(self, number: int, payload: memoryview) -> bool:
        receiver = self._receiver
        if receiver is None or not receiver.is_open:
            return False
        receiver.take(number, payload)
        return True

    async def _wait_for_link(self) -> None:
        with anyio.move_on_after(OUTAGE_S) as waiting:
            await self._link.mended.wait()
            if self._receiver is None or not self._receiver.is_open:
                # An agent that comes back does not know this migration's key.
                await anyio.sleep_forever()
        if waiting.cancelled_caught:
            raise PeerGone(f"no data connection worked for {OUTAGE_S:g} s")

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        self._cap = bytes_per_s
        self._lifted.set()

    async def aclose(self) -> None:
        """Nothing is open between two rounds."""
        step()
