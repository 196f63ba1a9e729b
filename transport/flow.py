"""What all connections of one sending migration share, under one lock: the books, the window, the rate.

Law: no socket and no event loop. Threads meet here and nowhere else. Whoever must wait registers a `Waker`
under the lock and then polls it together with its socket; whoever changes something wakes all that wait.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

from transport import limits
from transport.buffers import BufferPool, capacity_for
from transport.credit import TokenBucket
from transport.errors import LocalMisuse, PeerMisbehaved
from transport.frames import HEADER_BYTES, TAG_BYTES, Header, Kind, pack_header
from transport.ledger import SealedRecord, SendLedger
from transport.producer import Producer
from transport.seal import Keys, Sealer

__all__ = ["Flow", "Waker"]


class Waker:
    """A file descriptor that becomes readable when something has changed."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._descriptor

    def wake(self) -> None:
        os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self._descriptor)
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self._descriptor)


class Flow:
    """The shared state of a SendBundle. Every method may be called from any thread."""

    def __init__(
        self, keys: Keys, *, window_bytes: int, max_payload_bytes: int, bandwidth_bytes_per_s: float | None
    ) -> None:
        if not 0 < max_payload_bytes <= limits.MAX_PAYLOAD_BYTES:
            raise LocalMisuse(f"a payload has 1 to {limits.MAX_PAYLOAD_BYTES} bytes, not {max_payload_bytes}")
        self.max_payload_bytes: Final = max_payload_bytes
        self._sealer = Sealer(keys, Kind.DATA)
        self._lock = threading.Lock()
        self._ledger = SendLedger(window_bytes)
        self._buffers: dict[int, bytearray] = {}
        self._pool = BufferPool(window_bytes + capacity_for(HEADER_BYTES + max_payload_bytes + TAG_BYTES))
        self._bucket = TokenBucket(bandwidth_bytes_per_s, limits.MAX_RECORD_BYTES)
        self._sleeping: set[Waker] = set()
        self._producer: Producer | None = None
        self._pulling = 0  # threads that have the producer in hand
        self._is_dry = False  # the producer has nothing now, and may have more
        self._mores = 0
        self._pulled_at: dict[int, int] = {}
        self._on_given: Callable[[int], None] | None = None
        self._is_draining = False
        self._is_interrupted = False
        self._rate_changes = 0
        self._failure: BaseException | None = None
        self._wire_bytes = 0
        self._resent_bytes = 0
        self._acked_payload_bytes = 0

    # --- figures ---

    @property
    def wire_bytes(self) -> int:
        return self._wire_bytes

    @property
    def resent_bytes(self) -> int:
        return self._resent_bytes

    @property
    def acked_payload_bytes(self) -> int:
        return self._acked_payload_bytes

    @property
    def in_flight_bytes(self) -> int:
        return self._ledger.in_flight_bytes

    # --- the round, from the bundle's task ---

    def begin(self, producer: Producer, on_given: Callable[[int], None] | None = None) -> None:
        """Start a round. What a cancelled round left un-acknowledged is sent first, before anything newer."""
        with self._lock:
            self._producer = producer
            self._on_given = on_given
            self._pulling = 0
            self._is_dry = False
            self._is_draining = not self._ledger.all_acked
            self._is_interrupted = False
            self._failure = None

    def interrupt(self) -> None:
        """Make all threads return soon: within one call of the producer."""
        with self._lock:
            self._is_interrupted = True
            self._wake_all()

    def fail(self, failure: BaseException) -> None:
        """End the round with an error of the producer's, or of the sealing."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
            self._is_interrupted = True
            self._wake_all()

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    @property
    def is_interrupted(self) -> bool:
        return self._is_interrupted

    @property
    def is_round_done(self) -> bool:
        with self._lock:
            return self._is_done()

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        with self._lock:
            now_s = time.monotonic()
            self._bucket.set_rate(bytes_per_s, now_s)
            self._rate_changes += 1
            self._wake_all()

    def break_slot(self, slot: int) -> int:
        """Queue what was on a broken connection; give the number of records."""
        with self._lock:
            count = self._ledger.break_slot(slot)
            self._wake_all()
            return count

    # --- records, from the threads ---

    def next_step(self, slot: int, waker: Waker) -> SealedRecord | Producer | None:
        """What a connection should do now: send a record again, or have a new one made, or (None) wait.

        With None the waker is registered: it is woken when this answer may have changed.
        """
        with self._lock:
            again = self._ledger.take_resend(slot)
            if again is not None:
                return again
            if self._is_draining and self._ledger.all_acked:
                self._is_draining = False
            can_make = not (self._is_draining or self._is_dry) and self._ledger.room()
            if self._producer is not None and can_make:
                self._pulling += 1
                self._pulled_at[slot] = self._mores
                return self._producer
            self._sleeping.add(waker)
            return None

    def forget(self, waker: Waker) -> None:
        """Wake this one no more: its descriptor will be closed, and its number used again."""
        with self._lock:
            self._sleeping.discard(waker)

    def ran_dry(self, slot: int) -> None:
        """The producer gave NOT_YET: nobody asks it again before `more`, unless that came meanwhile."""
        with self._lock:
            self._pulling -= 1
            self._is_dry = self._pulled_at[slot] == self._mores

    def more(self) -> None:
        """The producer has something now."""
        with self._lock:
            self._mores += 1
            self._is_dry = False
            self._wake_all()

    def end_of_payloads(self) -> None:
        """The producer gave 0: the round is done when everything is acknowledged."""
        with self._lock:
            self._pulling -= 1
            self._producer = None
            self._wake_all()

    def tell_given(self) -> None:
        """Call `on_given`, once in a round, when all of its payloads are records. A thread asks after each step."""
        if self._on_given is None:
            return
        with self._lock:
            tell = self._on_given
            if tell is None or self._producer is not None or self._pulling:
                return
            self._on_given = None
            records = self._ledger.records
        tell(records)

    def seal(self, slot: int, payload: memoryview) -> SealedRecord:
        """Make a record of a payload, and keep it until it is acknowledged."""
        wire_bytes = HEADER_BYTES + len(payload) + TAG_BYTES
        with self._lock:
            seq = self._ledger.next_seq(slot)
            buffer = self._pool.lend(wire_bytes)
            self._buffers[seq] = buffer
        wire = memoryview(buffer)[:wire_bytes]
        header = pack_header(Header(kind=Kind.DATA, slot=slot, payload_bytes=len(payload), seq=seq))
        wire[:HEADER_BYTES] = header
        self._sealer.seal_into(seq, header, payload, wire[HEADER_BYTES:])
        record = SealedRecord(seq=seq, wire=wire, held_bytes=len(buffer), payload_bytes=len(payload))
        with self._lock:
            self._ledger.add(record)
            self._pulling -= 1
        return record

    def ack(self, seq: int, slot: int, sending: SealedRecord | None) -> None:
        """Book an acknowledgement from `slot`; `sending` is the record that it is still sending.

        Raises:
            PeerMisbehaved: that record was not brought to the peer by this connection.
        """
        if sending is not None and sending.seq == seq:
            raise PeerMisbehaved(f"record {seq} was acknowledged before it was sent")
        with self._lock:
            record = self._ledger.ack(seq, slot)
            self._acked_payload_bytes += record.payload_bytes
            record.wire.release()
            self._pool.give_back(self._buffers.pop(seq))
            self._wake_all()

    def pace(self, taken_bytes: int, waker: Waker) -> tuple[float, int]:
        """Take bytes from the bucket: the seconds to wait first, and a count of rate changes until now.

        When the wait is infinite, nothing was taken. The waker is woken when the rate changes.
        """
        with self._lock:
            wait_s = self._bucket.take(taken_bytes, time.monotonic())
            if wait_s > 0:
                self._sleeping.add(waker)
            return wait_s, self._rate_changes

    def pace_again(self, taken_bytes: int) -> None:
        """Undo a `pace` whose wait a new rate has made wrong."""
        with self._lock:
            self._bucket.give_back(taken_bytes, time.monotonic())

    def rate_changes(self, waker: Waker) -> int:
        """The count of rate changes; registers the waker."""
        with self._lock:
            self._sleeping.add(waker)
            return self._rate_changes

    def sent(self, count_bytes: int, *, is_repeat: bool) -> None:
        """Count bytes that a socket has taken."""
        with self._lock:
            self._wire_bytes += count_bytes
            if is_repeat:
                self._resent_bytes += count_bytes

    def _is_done(self) -> bool:
        return self._producer is None and self._pulling == 0 and self._ledger.all_acked

    def _wake_all(self) -> None:
        for waker in self._sleeping:
            waker.wake()
        self._sleeping.clear()
