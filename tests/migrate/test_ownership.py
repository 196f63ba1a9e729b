from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.ownership import (
    MAX_RECORD_BYTES,
    Ownership,
    RecordInvalid,
    Verdict,
    format_record,
    next_generation,
    parse_record,
    record_name,
    verdict_for_source,
)

OWNED = Ownership(guest_id="guest-1", generation=4, owner="host-a", migration_id="m1")
CLAIM = next_generation(OWNED, "host-a", "m2")

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)


@given(names, st.integers(1, 10**12 - 1), names, names)
@settings(deadline=None)
def test_a_record_reads_back_as_it_was_written(
    guest: str, generation: int, owner: str, migration: str
) -> None:
    record = Ownership(guest_id=guest, generation=generation, owner=owner, migration_id=migration)
    assert parse_record(format_record(record)) == record


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_garbage_raises_only_record_invalid(data: bytes) -> None:
    with pytest.raises(RecordInvalid):
        parse_record(data)


@given(st.integers(0, 200))
@settings(deadline=None)
def test_a_torn_record_is_no_record(cut: int) -> None:
    data = format_record(OWNED)
    if cut < len(data):
        with pytest.raises(RecordInvalid):
            parse_record(data[:cut])


def test_a_record_has_these_bytes() -> None:
    assert format_record(OWNED) == (
        b"vmferry-ownership 1\nguest guest-1\ngeneration 4\nowner host-a\nmigration m1\n"
    )


def test_a_long_record_is_not_even_looked_at() -> None:
    with pytest.raises(RecordInvalid, match="bytes"):
        parse_record(b"x" * (MAX_RECORD_BYTES + 1))


@pytest.mark.parametrize("guest_id", ["", "../x", "a/b", "a\0b", ".hidden", "x" * 129])
def test_an_identity_that_could_leave_the_directory_names_no_file(guest_id: str) -> None:
    with pytest.raises(RecordInvalid):
        record_name(guest_id, 1)


def test_names_sort_by_generation() -> None:
    names = [record_name("g", generation) for generation in (1, 2, 9, 10, 11, 100, 10**11)]
    assert names == sorted(names)


@pytest.mark.parametrize("generation", [0, -1, 10**12])
def test_generations_out_of_range_name_no_file(generation: int) -> None:
    with pytest.raises(RecordInvalid):
        record_name("g", generation)


def test_nobody_has_claimed_yet() -> None:
    assert verdict_for_source(None, CLAIM) is Verdict.UNDECIDED
    assert verdict_for_source(OWNED, CLAIM) is Verdict.UNDECIDED


def test_whoever_made_the_claim_owns_the_guest() -> None:
    assert verdict_for_source(CLAIM, CLAIM) is Verdict.SOURCE
    theirs = next_generation(OWNED, "host-b", "m2")
    assert verdict_for_source(theirs, CLAIM) is Verdict.TAKEN
    assert verdict_for_source(next_generation(theirs, "host-b", "m2"), CLAIM) is Verdict.DESTINATION
    another = next_generation(OWNED, "host-b", "m3")
    assert verdict_for_source(another, CLAIM) is Verdict.DESTINATION


def test_a_guest_that_was_given_back_belongs_to_the_source() -> None:
    returned = Ownership(guest_id="guest-1", generation=6, owner="host-a", migration_id="m2")
    assert verdict_for_source(returned, CLAIM) is Verdict.SOURCE


def test_a_destination_that_gave_way_has_left_the_guest_to_the_source_whichever_move_asks() -> None:
    fence = Ownership(guest_id="guest-1", generation=CLAIM.generation, owner=CLAIM.owner, migration_id="m9")
    assert verdict_for_source(fence, CLAIM) is Verdict.SOURCE


def test_a_guest_that_came_home_by_another_move_is_not_this_old_copy() -> None:
    came_home = Ownership(guest_id="guest-1", generation=6, owner="host-a", migration_id="m3")
    assert verdict_for_source(came_home, CLAIM) is Verdict.DESTINATION
