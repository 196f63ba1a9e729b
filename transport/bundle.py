"""Several data connections as one: the sending half here, the receiving half in `receiving`.

Tasks and threads: `send_all` runs one task per connection, which dials and then sits on one worker thread (a
Courier) until the round is done or the connection breaks. They all end before `send_all` does, also when it is
cancelled. Between rounds there is no task and no thread, only open sockets.

Memory of a SendBundle: the window, one record more (the pool), and for each connection one payload buffer and
one record that may pass the window: at most window + (2 * connections + 1) * record size.

Law: no name of an event loop here, no page, no phase.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Awaitable, Callable

import anyio
import anyio.from_thread

from transport import limits
from transport.courier import Courier
from transport.credit import Backoff
from transport.errors import LocalMisuse, PeerGone, PeerMisbehaved
from transport.flow import Flow
from transport.frames import Kind
from transport.producer import Producer
from transport.receiving import Consumer, ReceiveBundle
from transport.seal import Keys, Opener
from transport.sockets import prepare_socket, run_interruptibly, shut_down

__all__ = ["Consumer", "Dial", "ReceiveBundle", "SendBundle"]

# Gives a connected, blocking socket for a slot, on which the hello has passed.
Dial = Callable[[int], Awaitable[socket.socket]]

# What ends a connection and not the migration. A peer that misbehaves is among them: anybody on the path can
# change bytes, and must gain nothing but a new connection by it.
_LINK_ERRORS = (OSError, PeerGone, PeerMisbehaved)

_FIRST_REDIAL_S = 0.05
_SLOWEST_REDIAL_S = 2.0


class SendBundle:
    """The sending side of one migration's data plane.

    One per migration and secret: its sequence numbers begin at 0.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        keys: Keys,
        connections: int,
        window_bytes: int = limits.WINDOW_BYTES,
        max_payload_bytes: int = limits.MAX_PAYLOAD_BYTES,
        bandwidth_bytes_per_s: float | None = None,
        outage_s: float = 30.0,
        dead_peer_s: float = 10.0,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        """Nothing is dialled before the first round.

        Args:
            dial: called again for a slot whose connection broke; OSError, PeerGone and PeerMisbehaved mean "not now".
            outage_s: how long no connection may work before the round ends with PeerGone.
            dead_peer_s: a connection that owes an acknowledgement and moves nothing for so long is broken.
            on_event: hears, in the bundle's task, of breaks and returns, as sentences for the log.
        """
        if not 0 < connections <= limits.MAX_CONNECTIONS:
            raise LocalMisuse(f"a migration has 1 to {limits.MAX_CONNECTIONS} connections, not {connections}")
        self._dial = dial
        self._connections = connections
        self._outage_s = outage_s
        self._dead_peer_s = dead_peer_s
        self._on_event = on_event or (lambda sentence: None)
        self._flow = Flow(
            keys,
            window_bytes=window_bytes,
            max_payload_bytes=max_payload_bytes,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        )
        self._opener = Opener(keys, Kind.ACK)
        self._couriers: dict[int, Courier] = {}
        self._limiter = anyio.CapacityLimiter(connections)
        self._dialling: set[anyio.CancelScope] = set()
        self._link_breaks = 0
        self._last_break: Exception | None = None
        self._well_at_s = 0.0
        self._is_sending = False
        self._is_closed = False

    async def send_all(
        self,
        producer: Producer,
        *,
        payloads: int | None = None,
        on_given: Callable[[int], None] | None = None,
    ) -> None:
        """Send everything that the producer gives; return when all of it is acknowledged.

        `payloads` says how many there are at most, where that is known: no more connections than that are
        woken. A few last pages on one connection instead of two take 0.6 ms less of a downtime (2 vCPUs).

        `on_given` hears, in the bundle's event loop, when all payloads have been given to connections: how many records
        the peer has when it has them all (`ReceiveBundle.await_applied`). Acknowledgements are still to come then. It
        hears nothing of a round that fails before.

        Returning is the barrier between two rounds. A call that was cancelled or has failed leaves records
        that may still arrive; the next call brings them to the peer before it asks its own producer.

        Raises:
            PeerGone: no connection worked for `outage_s`.
            LocalMisuse: closed, or another round is being sent.
            Exception: what the producer raised; nothing that it gave is lost or repeated by that.
        """
        if self._is_sending or self._is_closed:
            raise LocalMisuse("the bundle is closed, or sends another round")
        self._is_sending = True
        is_whole = False
        failure: BaseException | None = None
        try:
            self._well_at_s = anyio.current_time()
            self._flow.begin(producer, _in_its_loop(on_given) if on_given else None)
            try:
                async with anyio.create_task_group() as tasks:
                    for slot in range(self._connections if payloads is None else self._woken_by(payloads)):
                        tasks.start_soon(self._work_slot, slot)
            finally:
                failure = self._flow.failure
                is_whole = failure is None and self._flow.is_round_done
        finally:
            if not is_whole:
                # A record may be torn: its connection cannot be used again, the record can.
                for slot in list(self._couriers):
                    self._drop(slot)
            self._is_sending = False
        if failure is not None:
            raise failure

    @property
    def wire_bytes(self) -> int:
        """Bytes given to sockets so far: headers, tags and repeats included."""
        return self._flow.wire_bytes

    @property
    def resent_bytes(self) -> int:
        """The part of `wire_bytes` that had been given to a connection before that broke."""
        return self._flow.resent_bytes

    @property
    def acked_payload_bytes(self) -> int:
        """Bytes of payload that the peer has applied: over time, the goodput."""
        return self._flow.acked_payload_bytes

    @property
    def link_breaks(self) -> int:
        """Connections that broke after they had been made."""
        return self._link_breaks

    @property
    def in_flight_bytes(self) -> int:
        """Memory of records that are not acknowledged."""
        return self._flow.in_flight_bytes

    def more_to_send(self) -> None:
        """The producer, which gave NOT_YET, has something now. From any thread; harmless when nobody waits for it."""
        self._flow.more()

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        """Cap all connections together from now on; None lifts the cap, 0 holds everything."""
        self._flow.set_bandwidth(bytes_per_s)

    def break_connections(self) -> None:
        """Cut every connection, as a failing network would: for demonstrations and tests."""
        for courier in list(self._couriers.values()):
            shut_down(courier.sock)

    async def aclose(self) -> None:
        """Close all connections; a round that is being sent must have been cancelled. May be called twice."""
        if self._is_sending:
            raise LocalMisuse("the bundle sends a round: cancel it first")
        self._is_closed = True
        for slot in list(self._couriers):
            self._drop(slot)

    def _woken_by(self, payloads: int) -> int:
        # One at least: records of a round before may be left.
        return max(min(self._connections, payloads), 1)

    async def _work_slot(self, slot: int) -> None:
        backoff = Backoff(_FIRST_REDIAL_S, _SLOWEST_REDIAL_S, random.Random())
        is_flapping = False
        while not self._flow.is_interrupted and not self._flow.is_round_done:
            courier = self._couriers.get(slot)
            if courier is None:
                courier = await self._redial(slot, backoff, is_flapping=is_flapping)
                if courier is None:
                    return
            try:
                await run_interruptibly(courier.carry, self._flow.interrupt, self._limiter)
            except _LINK_ERRORS as exc:
                self._link_breaks += 1
                # Standing idle is no work while another connection waits: a peer that acknowledges nothing on any of
                # several would never be left.
                is_idle = courier.has_worked and self._flow.in_flight_bytes == 0
                is_flapping = not courier.is_acknowledged and not is_idle
                if not is_flapping:
                    backoff.reset()
                    self._well_at_s = anyio.current_time()
                self._last_break = exc
                count = self._drop(slot)
                self._on_event(f"data connection {slot} broke ({exc}); {count} records go again")
        self._stop_dialling()

    def _stop_dialling(self) -> None:
        """The round is over: nobody needs the connections that are still being dialled."""
        for scope in self._dialling:
            scope.cancel()

    async def _redial(self, slot: int, backoff: Backoff, *, is_flapping: bool) -> Courier | None:
        """Dial until there is a connection. None: the round is over, or the outage has lasted too long."""
        with anyio.CancelScope() as scope:
            self._dialling.add(scope)
            try:
                if is_flapping:
                    await self._pause(backoff)
                while not self._flow.is_interrupted:
                    try:
                        with anyio.fail_after(max(self._outage_s, 0.001)):
                            sock = await self._dial(slot)
                    except _LINK_ERRORS as exc:
                        self._last_break = exc
                        await self._pause(backoff)
                    else:
                        return self._connected(slot, sock)
            finally:
                self._dialling.discard(scope)
        return None

    def _connected(self, slot: int, sock: socket.socket) -> Courier:
        prepare_socket(sock)
        courier = Courier(sock, slot, self._flow, self._opener, dead_peer_s=self._dead_peer_s)
        self._couriers[slot] = courier
        if self._link_breaks:
            self._on_event(f"data connection {slot} is back")
        return courier

    async def _pause(self, backoff: Backoff) -> None:
        """Wait before the next attempt, or end the round when no connection has worked for too long."""
        left_s = self._well_at_s + self._outage_s - anyio.current_time()
        if self._couriers:
            # One that was just made has as long to prove itself as an old one.
            left_s += self._dead_peer_s
        is_idle = bool(self._couriers) and self._flow.in_flight_bytes == 0
        if left_s > 0 or is_idle or any(courier.is_acknowledged for courier in self._couriers.values()):
            await anyio.sleep(backoff.next_s())
            return
        cause = self._last_break
        gone = PeerGone(
            f"no data connection worked for {self._outage_s:g} s: {cause or type(cause).__name__}"
        )
        gone.__cause__ = cause
        self._flow.fail(gone)
        self._stop_dialling()

    def _drop(self, slot: int) -> int:
        """Close a slot's connection and queue what it carried; give the number of records."""
        self._couriers.pop(slot).close()
        return self._flow.break_slot(slot)


def _in_its_loop(tell: Callable[[int], None]) -> Callable[[int], None]:
    """Give what a connection's thread may call for it."""

    def call(count: int) -> None:
        anyio.from_thread.run_sync(tell, count)

    return call
