"""What was sent, what arrived: the books of both ends, which make a broken link harmless.

Law, **claim before apply**: a record's seq is claimed under a lock before its payload is applied, and never
claimed again. A record that was sent twice (once into a connection that died, once into its successor) may
linger in the dead connection's buffers for as long as the kernel likes. Without the claim it could be applied
late, after a newer round's version of the same page, and the guest would run on old memory. With it, either the
copy that lingers was claimed first, and then the second one is the duplicate, or it is the duplicate itself.
The sender does its part: a round ends when every record of it is acknowledged, so that every seq of an older
round is claimed and applied before the first of a newer one exists.

Pure: no socket, no clock. Not thread-safe: each bundle holds one lock around its ledger.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

from transport import limits
from transport.errors import LocalMisuse, PeerMisbehaved

__all__ = ["ReceiveLedger", "SealedRecord", "SendLedger"]


@dataclass(slots=True, kw_only=True)
class SealedRecord:
    """One record as it goes over the wire, kept until it is acknowledged.

    `wire` is header, ciphertext and tag, and never changes. `held_bytes` is the memory behind it. `was_begun`:
    a connection has sent some of it, so that sending it now is a repetition.
    """

    seq: int
    wire: memoryview
    held_bytes: int
    payload_bytes: int
    was_begun: bool = False


class SendLedger:
    """The sender's book: which records are on which connection, or wait to be sent again."""

    def __init__(self, window_bytes: int) -> None:
        self._window_bytes: Final = _checked_window(window_bytes)
        self._span_records: Final = limits.span_records(window_bytes)
        self._next_seq = 0
        self._in_flight_bytes = 0
        # Both in the order of seq, for that is the order of adding. The slot is None in the resend queue.
        self._records: dict[int, SealedRecord] = {}
        self._slots: dict[int, int | None] = {}
        self._resend: list[int] = []

    @property
    def records(self) -> int:
        """How many sequence numbers were taken: every record so far is below."""
        return self._next_seq

    @property
    def in_flight_bytes(self) -> int:
        """Memory of all records that are not acknowledged."""
        return self._in_flight_bytes

    @property
    def all_acked(self) -> bool:
        """Nothing is in flight, nothing waits, and no seq was taken whose record is still to come."""
        return not self._slots

    @property
    def resend_count(self) -> int:
        """Records that wait to be sent again."""
        return len(self._resend)

    def room(self) -> bool:
        """Whether another record may begin: less than the window is held, and the span is not used up.

        The last record may pass the window by its own size; each connection can have one such.
        """
        if self._in_flight_bytes >= self._window_bytes:
            return False
        oldest = next(iter(self._slots), self._next_seq)
        return self._next_seq - oldest < self._span_records

    def next_seq(self, slot: int) -> int:
        """Take the next sequence number for a record on `slot`; `add` must follow.

        Raises:
            LocalMisuse: the migration has used up its sequence numbers.
        """
        seq = self._next_seq
        if seq >= limits.MAX_RECORDS:
            raise LocalMisuse(f"a migration has at most {limits.MAX_RECORDS} records")
        self._next_seq = seq + 1
        self._slots[seq] = slot
        return seq

    def add(self, record: SealedRecord) -> None:
        """Keep a sealed record, whose seq was taken before, until it is acknowledged."""
        if record.seq not in self._slots or record.seq in self._records:
            raise LocalMisuse(f"record {record.seq} was not numbered here, or was added before")
        self._records[record.seq] = record
        self._in_flight_bytes += record.held_bytes

    def ack(self, seq: int, slot: int) -> SealedRecord:
        """Let go of a record that `slot`'s connection has brought to the peer, and give it back.

        Raises:
            PeerMisbehaved: no such record is under way on that connection.
        """
        if self._slots.get(seq) != slot or seq not in self._records:
            raise PeerMisbehaved(
                f"record {seq} was acknowledged on connection {slot}, which did not carry it"
            )
        del self._slots[seq]
        record = self._records.pop(seq)
        self._in_flight_bytes -= record.held_bytes
        return record

    def break_slot(self, slot: int) -> int:
        """Queue everything that was on a broken connection to be sent again; give the number of records."""
        lost = [seq for seq, its_slot in self._slots.items() if its_slot == slot and seq in self._records]
        for seq in lost:
            self._slots[seq] = None
            heapq.heappush(self._resend, seq)
        return len(lost)

    def take_resend(self, slot: int) -> SealedRecord | None:
        """Move the oldest record of the resend queue to `slot`; None when the queue is empty."""
        if not self._resend:
            return None
        seq = heapq.heappop(self._resend)
        self._slots[seq] = slot
        return self._records[seq]


class ReceiveLedger:
    """The receiver's book: which records were claimed, and which of them are applied.

    Everything below a floor is applied; above it two sets, bounded by the span.
    """

    def __init__(self, window_bytes: int) -> None:
        self._span_records: Final = limits.span_records(_checked_window(window_bytes))
        self._floor = 0
        self._claimed: set[int] = set()
        self._applied: set[int] = set()

    @property
    def floor(self) -> int:
        """The oldest record that is not applied."""
        return self._floor

    def claim(self, seq: int) -> bool:
        """Claim a record that was opened. False: it was claimed before, and must not be applied.

        A duplicate is acknowledged once it `is_applied`, for its first acknowledgement may be lost.

        Raises:
            PeerMisbehaved: so far ahead that no correct sender is there.
        """
        if seq < self._floor or seq in self._claimed:
            return False
        if seq - self._floor >= self._span_records:
            raise PeerMisbehaved(
                f"record {seq} came while record {self._floor} is missing: more than {self._span_records} ahead"
            )
        self._claimed.add(seq)
        return True

    def applied(self, seq: int) -> None:
        """Note that a claimed record is applied."""
        if seq not in self._claimed or seq in self._applied:
            raise LocalMisuse(f"record {seq} was not claimed, or was applied before")
        self._applied.add(seq)
        while self._floor in self._applied:
            self._applied.remove(self._floor)
            self._claimed.remove(self._floor)
            self._floor += 1

    def is_applied(self, seq: int) -> bool:
        """Whether the record may be acknowledged."""
        return seq < self._floor or seq in self._applied


def _checked_window(window_bytes: int) -> int:
    if not 0 < window_bytes <= limits.MAX_WINDOW_BYTES:
        raise LocalMisuse(f"a window has 1 to {limits.MAX_WINDOW_BYTES} bytes, not {window_bytes}")
    return window_bytes
