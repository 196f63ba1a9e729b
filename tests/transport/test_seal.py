"""Each nonce once, each byte proved."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import limits
from transport.errors import BadSeal, LocalMisuse
from transport.frames import TAG_BYTES, Header, Kind, pack_header
from transport.seal import Keys, Opener, Sealer

KEYS = Keys(bytes(range(32)))


def sealed(sealer: Sealer, seq: int, payload: bytes) -> tuple[bytes, bytes]:
    header = pack_header(Header(kind=Kind.DATA, slot=0, payload_bytes=len(payload), seq=seq))
    out = bytearray(len(payload) + TAG_BYTES)
    sealer.seal_into(seq, header, payload, memoryview(out))
    return header, bytes(out)


def opened(opener: Opener, seq: int, header: bytes, record: bytes) -> bytes:
    out = bytearray(len(record) - TAG_BYTES)
    opener.open_into(seq, header, record, memoryview(out))
    return bytes(out)


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=1, max_size=1000), st.integers(0, limits.span_records(limits.MAX_WINDOW_BYTES) - 1))
def test_what_was_sealed_opens(payload: bytes, seq: int) -> None:
    header, record = sealed(Sealer(KEYS, Kind.DATA), seq, payload)
    assert opened(Opener(KEYS, Kind.DATA), seq, header, record) == payload
    assert payload not in record or len(payload) < 4


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 41), st.integers(1, 255))
def test_one_changed_byte_of_header_or_record_is_a_bad_seal(at: int, flip: int) -> None:
    header, record = sealed(Sealer(KEYS, Kind.DATA), 0, b"ten bytes!")
    both = bytearray(header + record)
    both[at] ^= flip
    with pytest.raises(BadSeal):
        opened(Opener(KEYS, Kind.DATA), 0, bytes(both[:16]), bytes(both[16:]))


def test_a_record_opens_under_no_other_seq_direction_or_secret() -> None:
    header, record = sealed(Sealer(KEYS, Kind.DATA), 5, b"payload")
    for opener, seq in (
        (Opener(KEYS, Kind.DATA), 6),
        (Opener(KEYS, Kind.DATA), 5 + limits.RECORDS_PER_KEY),
        (Opener(KEYS, Kind.ACK), 5),
        (Opener(Keys(b"x" * 32), Kind.DATA), 5),
    ):
        with pytest.raises(BadSeal):
            opened(opener, seq, header, record)


def test_no_seq_is_sealed_twice_in_whatever_order() -> None:
    sealer = Sealer(KEYS, Kind.DATA)
    for seq in (0, 3, 1, 2, 5):
        sealed(sealer, seq, b"x")
    for seq in (0, 1, 2, 3, 5):
        with pytest.raises(LocalMisuse, match="before"):
            sealed(sealer, seq, b"y")
    sealed(sealer, 4, b"x")


@pytest.mark.parametrize("seq", [-1, limits.MAX_RECORDS])
def test_a_seq_that_does_not_exist_is_not_sealed(seq: int) -> None:
    with pytest.raises(LocalMisuse):
        Sealer(KEYS, Kind.DATA).seal_into(seq, b"h" * 16, b"x", memoryview(bytearray(17)))


def test_keys_change_after_their_number_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECORDS_PER_KEY", 2)
    sealer, opener = Sealer(KEYS, Kind.DATA), Opener(KEYS, Kind.DATA)
    records = [sealed(sealer, seq, b"same payload") for seq in range(8)]
    # Backwards, too: an epoch that was dropped is derived again.
    for seq in [*range(8), *reversed(range(8))]:
        assert opened(opener, seq, *records[seq]) == b"same payload"
    assert KEYS.record_key(Kind.DATA, 0) != KEYS.record_key(Kind.DATA, 1)


def test_each_purpose_has_a_key_of_its_own() -> None:
    keys = {KEYS.hello, KEYS.record_key(Kind.DATA, 0), KEYS.record_key(Kind.ACK, 0), KEYS.secret}
    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)


def test_a_secret_shows_in_no_log() -> None:
    assert "secret" not in repr(KEYS)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_secret_has_exactly_32_bytes(length: int) -> None:
    with pytest.raises(LocalMisuse):
        Keys(bytes(length))


def test_less_than_a_tag_is_a_bad_seal() -> None:
    with pytest.raises(BadSeal):
        Opener(KEYS, Kind.DATA).open_into(0, b"h" * 16, b"short", memoryview(bytearray(0)))
