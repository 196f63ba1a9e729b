"""One data connection of the sender, as a loop in one worker thread.

Law: this thread alone reads and writes the socket; every wait is one poll of the socket and a Waker, or one send
that the kernel ends after _SEND_TIMEOUT_S. It never holds the flow's lock while it waits, seals or calls the producer.
"""

from __future__ import annotations

import math
import select
import socket
import struct
import time
from typing import Final

from transport.errors import LocalMisuse, PeerGone, ReplayedRecord
from transport.flow import Flow, Waker
from transport.frames import HEADER_BYTES, TAG_BYTES, Kind, parse_header
from transport.ledger import SealedRecord
from transport.producer import NOT_YET, Producer
from transport.seal import Opener

__all__ = ["ACK_BYTES", "Courier"]

ACK_BYTES: Final = HEADER_BYTES + 8 + TAG_BYTES

# The longest single wait: how late a thread may be to see that a quiet peer is overdue.
_LONGEST_WAIT_S: Final = 0.5
# A send blocks in the kernel for so long at most: how late a thread may be to see that it is to end. A socket
# that does not block takes a record in several sends with a poll between each: 5 % slower (512 KiB, 2 vCPUs).
_SEND_TIMEOUT_S: Final = 0.05


class Courier:
    """Carries records over one connected socket until the round is done or the connection breaks.

    The caller owns the socket and closes it; `carry` may be called again for the next round.
    """

    def __init__(
        self, sock: socket.socket, slot: int, flow: Flow, opener: Opener, *, dead_peer_s: float
    ) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(_SEND_TIMEOUT_S))
        self.sock: Final = sock
        self._slot: Final = slot
        self._flow: Final = flow
        self._opener: Final = opener
        self._dead_peer_s: Final = dead_peer_s
        self._waker = Waker()
        self._poll = select.poll()
        self._poll.register(self._waker, select.POLLIN)
        self._poll.register(sock, select.POLLIN)
        self._scratch = bytearray(flow.max_payload_bytes)
        self._acks = bytearray(64 * ACK_BYTES)
        self._ack_fill = 0
        self._last_ack_seq = -1
        self._sending: SealedRecord | None = None
        self._owed = 0  # records that the peer has some of, and has not acknowledged
        self._has_worked = False
        self._is_acknowledged = False
        self._heard_at_s = 0.0

    @property
    def has_worked(self) -> bool:
        """Something was acknowledged, or the link stood for a while with nothing due.

        A connection that breaks as soon as it is made has not worked: an outage goes on through it.
        """
        return self._has_worked

    @property
    def is_acknowledged(self) -> bool:
        """The peer has acknowledged something on this connection."""
        return self._is_acknowledged

    def carry(self) -> None:
        """Work until the round is done or the flow is interrupted. Blocks; one thread at a time.

        Raises:
            PeerGone, OSError: the connection broke, or was silent for too long (the world's fault).
            PeerMisbehaved: acknowledgements that are not the peer's (whoever is on the path).
        """
        self._heard_at_s = time.monotonic()
        self._read_acks()
        while not self._flow.is_interrupted:
            step = self._flow.next_step(self._slot, self._waker)
            if isinstance(step, SealedRecord):
                self._send(step)
            elif step is not None:
                self._make_and_send(step)
            elif self._flow.is_round_done:
                return
            else:
                self._wait(_LONGEST_WAIT_S)
                continue
            self._flow.tell_given()

    def close(self) -> None:
        """Close the socket and what belongs to the thread, which must have ended."""
        self.sock.close()
        self._flow.forget(self._waker)
        self._waker.close()

    def _make_and_send(self, producer: Producer) -> None:
        payload = memoryview(self._scratch)
        try:
            length = producer(payload)
            if length == 0:
                self._flow.end_of_payloads()
                return
            if length == NOT_YET:
                self._flow.ran_dry(self._slot)
                return
            if not 0 < length <= len(payload):
                raise LocalMisuse(f"a producer gave {length} bytes in a buffer of {len(payload)}")
            record = self._flow.seal(self._slot, payload[:length])
        except Exception as exc:
            # The producer's error, not the link's: it ends the round for all connections.
            self._flow.fail(exc)
            return
        self._send(record)

    def _send(self, record: SealedRecord) -> None:
        # Already while it waits: an acknowledgement of it frees what is about to be sent.
        self._sending = record
        if not self._pace(len(record.wire)):
            return
        is_repeat, record.was_begun = record.was_begun, True
        self._owed += 1
        if self._owed == 1:
            self._heard_at_s = time.monotonic()
        rest = record.wire
        while rest:
            if self._flow.is_interrupted:
                return
            try:
                taken = self.sock.send(rest)
            except BlockingIOError:
                self._wait(_LONGEST_WAIT_S, for_writing=True)
                continue
            self._heard_at_s = time.monotonic()
            self._flow.sent(taken, is_repeat=is_repeat)
            rest = rest[taken:]
        rest.release()
        self._sending = None
        if self._owed > 1:
            self._read_acks()

    def _pace(self, wire_bytes: int) -> bool:
        """Wait until the rate allows a record. False: interrupted meanwhile."""
        while True:
            wait_s, changes = self._flow.pace(wire_bytes, self._waker)
            until_s = time.monotonic() + wait_s
            while (left_s := until_s - time.monotonic()) > 0:
                if self._flow.is_interrupted:
                    return False
                if self._flow.rate_changes(self._waker) != changes:
                    break
                self._wait(min(left_s, _LONGEST_WAIT_S))
            else:
                return True
            if not math.isinf(wait_s):
                self._flow.pace_again(wire_bytes)

    def _wait(self, at_most_s: float, *, for_writing: bool = False) -> None:
        """Sleep until the socket or the flow has something, and book what came."""
        begun_s = time.monotonic()
        at_most_s = min(at_most_s, self._dead_peer_s)
        self._poll.modify(self.sock, select.POLLIN | select.POLLOUT if for_writing else select.POLLIN)
        # Rounded up: a poll of 0 ms would make a busy loop of the last millisecond.
        ready = self._poll.poll(math.ceil(at_most_s * 1000))
        ended_s = time.monotonic()
        for descriptor, events in ready:
            if descriptor == self._waker.fileno():
                self._waker.clear()
            elif events & ~select.POLLOUT:
                self._read_acks()
        if self._owed == 0:
            self._heard_at_s = ended_s
            self._has_worked = self._has_worked or ended_s - begun_s >= _LONGEST_WAIT_S
        elif ended_s - self._heard_at_s > self._dead_peer_s:
            raise PeerGone(f"nothing was acknowledged on the connection for {self._dead_peer_s:g} s")

    def _read_acks(self) -> None:
        """Book all acknowledgements that are there, without waiting."""
        while True:
            try:
                got = self.sock.recv_into(memoryview(self._acks)[self._ack_fill :], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if got == 0:
                raise PeerGone("the other end closed the connection")
            was_all = got < len(self._acks) - self._ack_fill
            fill = self._ack_fill + got
            whole = fill - fill % ACK_BYTES
            with memoryview(self._acks) as acks:
                for start in range(0, whole, ACK_BYTES):
                    self._book(acks[start : start + ACK_BYTES])
            self._acks[: fill - whole] = self._acks[whole:fill]
            self._ack_fill = fill - whole
            self._heard_at_s = time.monotonic()
            if was_all:
                return

    def _book(self, sealed: memoryview) -> None:
        header = sealed[:HEADER_BYTES]
        seq = parse_header(header, expect=Kind.ACK, max_payload_bytes=8).seq
        body = bytearray(8)
        self._opener.open_into(seq, header, sealed[HEADER_BYTES:], memoryview(body))
        if seq <= self._last_ack_seq:
            raise ReplayedRecord(seq)
        self._last_ack_seq = seq
        self._flow.ack(int.from_bytes(body, "big"), self._slot, self._sending)
        self._owed -= 1
        self._has_worked = self._is_acknowledged = True


def _timeval(seconds: float) -> bytes:
    """Give a `struct timeval` of this machine."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
