"""The books of both ends: nothing lost, nothing twice, nothing old over new."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import limits
from transport.errors import LocalMisuse, PeerMisbehaved
from transport.ledger import ReceiveLedger, SealedRecord, SendLedger

WINDOW = 4096


def send(ledger: SendLedger, slot: int = 0, held_bytes: int = 1000) -> int:
    seq = ledger.next_seq(slot)
    wire = memoryview(bytes(held_bytes))
    ledger.add(SealedRecord(seq=seq, wire=wire, held_bytes=held_bytes, payload_bytes=held_bytes))
    return seq


def test_a_record_may_begin_while_less_than_the_window_is_held() -> None:
    ledger = SendLedger(WINDOW)
    send(ledger, held_bytes=WINDOW - 1)
    assert ledger.room()
    send(ledger, held_bytes=1)
    assert not ledger.room()
    ledger.ack(1, 0)
    assert ledger.room()
    assert ledger.in_flight_bytes == WINDOW - 1


def test_a_record_that_is_long_under_way_stops_the_others_at_the_span() -> None:
    ledger = SendLedger(WINDOW)
    stuck = send(ledger, slot=1, held_bytes=1)
    span = limits.span_records(WINDOW)
    for _ in range(span - 1):
        assert ledger.room()
        ledger.ack(send(ledger, held_bytes=1), 0)
    assert not ledger.room()
    ledger.ack(stuck, 1)
    assert ledger.room()


def test_a_broken_connection_gives_its_records_to_the_others_oldest_first() -> None:
    ledger = SendLedger(1 << 20)
    on_zero = [send(ledger, slot=0) for _ in range(3)]
    on_one = send(ledger, slot=1)
    assert ledger.break_slot(0) == 3
    assert ledger.resend_count == 3
    taken = [record.seq for _ in range(3) if (record := ledger.take_resend(1))]
    assert taken == on_zero
    assert ledger.take_resend(1) is None
    for seq in [*taken, on_one]:
        ledger.ack(seq, 1)
    assert ledger.all_acked


def test_nothing_acknowledged_is_sent_again() -> None:
    ledger = SendLedger(1 << 20)
    first, second = send(ledger), send(ledger)
    ledger.ack(first, 0)
    ledger.break_slot(0)
    again = ledger.take_resend(0)
    assert again is not None
    assert again.seq == second
    assert ledger.take_resend(0) is None


def test_only_the_connection_that_carries_a_record_can_acknowledge_it() -> None:
    ledger = SendLedger(1 << 20)
    seq = send(ledger, slot=0)
    for wrong_seq, wrong_slot in ((seq, 1), (seq + 1, 0)):
        with pytest.raises(PeerMisbehaved):
            ledger.ack(wrong_seq, wrong_slot)
    ledger.break_slot(0)
    with pytest.raises(PeerMisbehaved):
        ledger.ack(seq, 0)


def test_a_seq_without_its_record_keeps_the_round_open_and_cannot_be_acknowledged() -> None:
    ledger = SendLedger(WINDOW)
    seq = ledger.next_seq(0)
    assert not ledger.all_acked
    with pytest.raises(PeerMisbehaved):
        ledger.ack(seq, 0)


@pytest.mark.parametrize("window_bytes", [0, -1, limits.MAX_WINDOW_BYTES + 1])
def test_a_window_has_its_limits(window_bytes: int) -> None:
    for ledger in (SendLedger, ReceiveLedger):
        with pytest.raises(LocalMisuse):
            ledger(window_bytes)


def test_a_claimed_record_is_never_claimed_again_applied_or_not() -> None:
    ledger = ReceiveLedger(WINDOW)
    assert ledger.claim(0)
    assert not ledger.claim(0)
    assert not ledger.is_applied(0)
    ledger.applied(0)
    assert not ledger.claim(0)
    assert ledger.is_applied(0)


def test_a_copy_that_lingered_is_dropped_after_newer_rounds_came() -> None:
    # The old version of a page was sent as record 0 into a connection that died, and again into another; the
    # next round sent the new version as record 1. Then the dead connection's buffer is read.
    ledger = ReceiveLedger(WINDOW)
    page = ""
    for seq, version in ((0, "old"), (1, "new"), (0, "old")):
        if ledger.claim(seq):
            page = version
            ledger.applied(seq)
    assert page == "new"


def test_a_seq_at_the_end_of_the_span_passes_and_one_more_does_not() -> None:
    ledger = ReceiveLedger(WINDOW)
    span = limits.span_records(WINDOW)
    assert ledger.claim(span - 1)
    with pytest.raises(PeerMisbehaved):
        ledger.claim(span)
    assert ledger.claim(0)
    ledger.applied(0)
    assert ledger.claim(span)


def test_what_was_not_claimed_cannot_be_applied() -> None:
    ledger = ReceiveLedger(WINDOW)
    with pytest.raises(LocalMisuse):
        ledger.applied(0)


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), st.integers(1, 200))
def test_in_any_order_with_any_repetition_everything_is_applied_once_and_the_sets_empty(
    rng: random.Random, count: int
) -> None:
    ledger = ReceiveLedger(1 << 20)
    arrivals = list(range(count)) * 2
    rng.shuffle(arrivals)
    applied = []
    for seq in arrivals:
        if ledger.claim(seq):
            applied.append(seq)
            ledger.applied(seq)
    assert sorted(applied) == list(range(count))
    assert ledger.floor == count
    assert not ledger._claimed
    assert not ledger._applied
