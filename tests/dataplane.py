"""What the data planes of tests without a wire have in common: the books of the real one, `transport.ledger`.

Law: a payload has one number and is applied once, whatever is sent again. The last one of a round is still on its way
when the word comes that all have left, as it is between two hosts.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio

from memory.codec import MAX_PAYLOAD_BYTES
from migrate.ports import PayloadProducer
from transport.producer import NOT_YET

__all__ = ["Applied", "Carrier"]


class Carrier:
    """A `migrate.ports.PayloadSender` but for its figures: each payload is carried when the next one is asked for."""

    def __init__(self) -> None:
        self._records = 0
        self._buffer = memoryview(bytearray(MAX_PAYLOAD_BYTES))
        self._more = anyio.Event()

    async def carry(self, number: int, payload: memoryview) -> None:
        """Bring one to the other end, and return when it is acknowledged."""
        raise NotImplementedError

    def more_to_send(self) -> None:
        self._more.set()

    async def send_all(
        self,
        producer: PayloadProducer,
        *,
        payloads: int | None = None,
        on_given: Callable[[int], None] | None = None,
    ) -> None:
        held: memoryview | None = None
        while True:
            size = producer(self._buffer)
            if not size and on_given is not None:
                on_given(self._records)
            if held is not None:
                await self.carry(self._records - 1, held)
                held = None
            if not size:
                return
            if size == NOT_YET:
                await self._more.wait()
                self._more = anyio.Event()
            else:
                held = memoryview(bytes(self._buffer[:size]))
                self._records += 1


class Applied:
    """Which of them the other end has applied; they come in order."""

    def __init__(self) -> None:
        self.records = 0
        self._came = anyio.Event()

    def is_new(self, number: int) -> bool:
        """Claim one. False: it was applied before."""
        if number < self.records:
            return False
        self.records = number + 1
        self._came.set()
        self._came = anyio.Event()
        return True

    async def wait_for(self, records: int, within_s: float) -> bool:
        """As `migrate.ports.PayloadReceiver.await_applied`."""
        with anyio.move_on_after(within_s):
            while self.records < records:
                await self._came.wait()
        return self.records >= records
