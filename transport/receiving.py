"""The destination's end of the data plane: records in, payloads opened, each applied once, acknowledged.

Tasks and threads: one worker thread per connection, in `serve`; `close` makes all of them end. Memory: two
buffers of one record each per connection, and the ledger's bounded sets.
Law: what a connection brings is parsed only after its seal opened, except the 16 bytes of a header, which are
checked against limits first.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread

from transport import limits
from transport.errors import LocalMisuse, PeerGone, PeerMisbehaved
from transport.frames import HEADER_BYTES, TAG_BYTES, Header, Kind, pack_header, parse_header
from transport.ledger import ReceiveLedger
from transport.seal import Keys, Opener, Sealer
from transport.sockets import prepare_socket, run_interruptibly, shut_down

__all__ = ["Consumer", "ReceiveBundle"]

Consumer = Callable[[memoryview], None]

# A thread that waits for a record is woken when so many bytes of it are there, not by every segment: a receiver that
# does nothing else sleeps 690 times for 157 MB at 1 Gbit/s where it slept 70,000 times, and takes 0.2 s of CPU where
# it took 0.5 (2 vCPUs; no card joins segments). No more: what waits in the kernel closes the window of a long link.
_WAKE_BYTES: Final = 256 << 10


class ReceiveBundle:
    """Gives every payload of one migration to `consumer`, once, from as many connections as the source opens.

    The consumer is called from the connections' threads, several at once. Its first exception ends the bundle:
    it stands in `failure`, all connections are closed, nothing more is consumed or acknowledged.
    """

    def __init__(
        self,
        *,
        keys: Keys,
        consumer: Consumer,
        window_bytes: int = limits.WINDOW_BYTES,
        max_payload_bytes: int = limits.MAX_PAYLOAD_BYTES,
        max_connections: int | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        """`limit_bytes` of records, repeats included, are taken at most: more end the bundle."""
        if not 0 < max_payload_bytes <= limits.MAX_PAYLOAD_BYTES:
            raise LocalMisuse(f"a payload has 1 to {limits.MAX_PAYLOAD_BYTES} bytes, not {max_payload_bytes}")
        self._consumer = consumer
        self._max_payload_bytes = max_payload_bytes
        self._max_connections = limits.MAX_CONNECTIONS if max_connections is None else max_connections
        self._limit_bytes = limit_bytes
        self._opener = Opener(keys, Kind.DATA)
        self._sealer = Sealer(keys, Kind.ACK)
        self._ledger = ReceiveLedger(window_bytes)
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._is_closed = False
        self._next_ack_seq = 0
        self._received_bytes = 0
        self._records = 0
        self._duplicates = 0
        self._failure: Exception | None = None
        self._limiter = anyio.CapacityLimiter(limits.MAX_CONNECTIONS)

    @property
    def received_bytes(self) -> int:
        """Bytes of all records that came in whole, repeats included."""
        return self._received_bytes

    @property
    def records(self) -> int:
        """Records that were applied."""
        return self._records

    @property
    def duplicates(self) -> int:
        """Records that came again and were dropped."""
        return self._duplicates

    @property
    def failure(self) -> Exception | None:
        """The consumer's first exception."""
        return self._failure

    def serve(self, sock: socket.socket) -> None:
        """Work on one connection, whose hello has passed, until it ends; closes the socket. Blocks.

        Returns when the source hung up between two records, or the bundle was closed or has failed.

        Raises:
            PeerGone: the connection broke in the middle of a record.
            PeerMisbehaved: what came is no record of this migration. Other connections go on.
        """
        with sock:
            if not self._enter(sock):
                return
            try:
                prepare_socket(sock)
                sock.settimeout(None)
                self._serve_records(sock)
            except OSError as exc:
                if not self._is_closed:
                    raise PeerGone(f"a data connection broke: {exc}") from exc
            except PeerGone:
                if not self._is_closed:
                    raise
            finally:
                with self._changed:
                    self._sockets.discard(sock)
                    self._changed.notify_all()

    async def serve_connection(self, sock: socket.socket) -> None:
        """Run `serve` in a worker thread. A cancellation shuts this socket down and waits for the thread.

        One more than `limits.MAX_CONNECTIONS` is closed at once: it must not hold a file while it waits for a thread.
        """
        with sock:
            if self._limiter.available_tokens < 1:
                return
            await run_interruptibly(lambda: self.serve(sock), lambda: shut_down(sock), self._limiter)

    async def await_applied(self, records: int, within_s: float) -> bool:
        """Wait until all of the first `records` are applied; False: they were not in time, or the bundle has ended."""
        if self._is_whole(records):
            return True
        return await anyio.to_thread.run_sync(self._wait_applied, records, within_s)

    def _wait_applied(self, records: int, within_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_whole(records), within_s)
            return self._is_whole(records)

    def _is_whole(self, records: int) -> bool:
        return self._ledger.floor >= records

    def close(self) -> None:
        """Make all serving threads end, each after the record that it is applying."""
        with self._changed:
            self._is_closed = True
            for sock in self._sockets:
                shut_down(sock)
            self._changed.notify_all()

    async def aclose(self) -> None:
        """Close; when this returns the consumer is called no more. May be called twice."""
        self.close()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._wait_until_idle)

    def _wait_until_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._sockets)

    def _enter(self, sock: socket.socket) -> bool:
        with self._changed:
            if self._is_closed or len(self._sockets) >= self._max_connections:
                return False
            self._sockets.add(sock)
            return True

    def _serve_records(self, sock: socket.socket) -> None:
        header_buffer = memoryview(bytearray(HEADER_BYTES))
        sealed_buffer = memoryview(bytearray(self._max_payload_bytes + TAG_BYTES))
        payload_buffer = memoryview(bytearray(self._max_payload_bytes))
        inlet = _Inlet(sock)
        while inlet.fill(header_buffer, may_end=True):
            header = parse_header(header_buffer, expect=Kind.DATA, max_payload_bytes=self._max_payload_bytes)
            sealed = sealed_buffer[: header.payload_bytes + TAG_BYTES]
            inlet.fill(sealed, may_end=False)
            payload = payload_buffer[: header.payload_bytes]
            self._opener.open_into(header.seq, header_buffer, sealed, payload)
            if not self._apply_once(header.seq, payload, HEADER_BYTES + len(sealed)):
                return
            self._acknowledge(sock, header)

    def _apply_once(self, seq: int, payload: memoryview, wire_bytes: int) -> bool:
        """Give a payload to the consumer unless another copy of it was claimed; False: the bundle has ended."""
        with self._changed:
            if self._is_closed:
                return False
            self._received_bytes += wire_bytes
            if self._limit_bytes is not None and self._received_bytes > self._limit_bytes:
                self._failure = self._failure or PeerMisbehaved(
                    f"the peer sent {self._received_bytes} bytes where {self._limit_bytes} were agreed on"
                )
                self.close()
                return False
            is_first = self._ledger.claim(seq)
            if not is_first:
                self._duplicates += 1
                # The thread that has claimed it is in the consumer and waits for nobody: this ends.
                self._changed.wait_for(lambda: self._is_closed or self._ledger.is_applied(seq))
                return not self._is_closed
        try:
            self._consumer(payload)
        except Exception as exc:
            with self._changed:
                self._failure = self._failure or exc
            self.close()
            return False
        with self._changed:
            self._ledger.applied(seq)
            self._records += 1
            self._changed.notify_all()
        return True

    def _acknowledge(self, sock: socket.socket, of: Header) -> None:
        with self._changed:
            ack_seq = self._next_ack_seq
            self._next_ack_seq += 1
        header = pack_header(Header(kind=Kind.ACK, slot=of.slot, payload_bytes=8, seq=ack_seq))
        record = bytearray(HEADER_BYTES + 8 + TAG_BYTES)
        record[:HEADER_BYTES] = header
        with memoryview(record) as view:
            self._sealer.seal_into(ack_seq, header, of.seq.to_bytes(8, "big"), view[HEADER_BYTES:])
        sock.sendall(record)


class _Inlet:
    """The bytes of one connection, waited for in large pieces.

    By poll alone: a `recv` that waits takes the bytes that are there, and is then woken by as many as it was to wait
    for at first, of which the missing ones are fewer.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def fill(self, out: memoryview, *, may_end: bool) -> bool:
        """Fill `out`. False: the peer hung up before the first byte, where it may."""
        filled = 0
        while True:
            try:
                got = self._sock.recv_into(out[filled:], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            else:
                filled += got
                if filled == len(out):
                    return True
                if got == 0:
                    if filled == 0 and may_end:
                        return False
                    raise PeerGone("a data connection ended in the middle of a record")
            # Never more than is missing: what comes after it may never come.
            wake_bytes = min(len(out) - filled, _WAKE_BYTES)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_bytes)
            self._poll.poll()
