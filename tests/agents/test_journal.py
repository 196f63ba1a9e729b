from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import journal
from agents.errors import JournalCorrupt
from agents.journal import AsyncJournal, Fact, JournalEntry, JournalFile, list_open, pack_entry, read_journal
from migrate.errors import JournalFailed

VECTORS = Path(__file__).resolve().parent.parent / "vectors"

ENTRIES = (
    JournalEntry(step="opened", at_s=1700000000.25, facts={"guest": "g-1", "generation": 7}),
    JournalEntry(step="committing", at_s=1700000001.5, facts={"digest": b"\x00\xff" * 8, "live": True}),
    JournalEntry(step="destroyed", at_s=1700000002.0),
)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[JournalFile]:
    file = JournalFile.create(tmp_path, "m-1")
    yield file
    file.close(ended=False)


def written(path: Path, entries: tuple[JournalEntry, ...] = ENTRIES) -> bytes:
    content = journal.MAGIC + b"".join(pack_entry(entry) for entry in entries)
    path.write_bytes(content)
    return content


def test_what_was_appended_is_read(file: JournalFile) -> None:
    for entry in ENTRIES:
        file.append(entry)
    assert read_journal(file.path) == ENTRIES


def test_a_new_journal_is_empty_and_for_its_owner_alone(file: JournalFile) -> None:
    assert read_journal(file.path) == ()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_the_bytes_of_a_journal_do_not_change(tmp_path: Path) -> None:
    assert written(tmp_path / "golden.log") == bytes.fromhex((VECTORS / "journal-v1.hex").read_text())


def test_a_second_journal_of_one_migration_is_refused(file: JournalFile, tmp_path: Path) -> None:
    with pytest.raises(JournalFailed, match="already"):
        JournalFile.create(tmp_path, "m-1")
    assert read_journal(file.path) == ()


@pytest.mark.parametrize("migration_id", ["", "../x", "a/b", ".hidden", "a\n", "x" * 129])
def test_an_identity_that_is_no_file_name_is_our_mistake(tmp_path: Path, migration_id: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        JournalFile.create(tmp_path, migration_id)


def test_a_cut_anywhere_leaves_a_prefix_of_the_entries(tmp_path: Path) -> None:
    path = tmp_path / "cut.log"
    content = written(path)
    ends = [len(journal.MAGIC)]
    for entry in ENTRIES:
        ends.append(ends[-1] + len(pack_entry(entry)))
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(1 for end in ends[1:] if end <= cut)
        assert read_journal(path) == ENTRIES[:whole], cut


def test_a_cut_followed_by_zeros_leaves_a_prefix_of_the_entries(tmp_path: Path) -> None:
    path = tmp_path / "zeros.log"
    content = written(path)
    start = len(content) - len(pack_entry(ENTRIES[-1]))
    for cut in range(start, len(content)):
        path.write_bytes(content[:cut] + bytes(len(content) - cut + 100))
        assert read_journal(path) in (ENTRIES[:-1], ENTRIES), cut


def test_one_wrong_byte_loses_the_last_entry_or_is_said(tmp_path: Path) -> None:
    path = tmp_path / "flipped.log"
    content = written(path)
    start_of_last = len(content) - len(pack_entry(ENTRIES[-1]))
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0x40
        path.write_bytes(damaged)
        if at >= start_of_last:
            assert read_journal(path) == ENTRIES[:-1], at
        else:
            with pytest.raises(JournalCorrupt):
                read_journal(path)


def test_damage_is_said_with_its_offset_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "damaged.log"
    content = bytearray(written(path))
    content[len(journal.MAGIC) + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalCorrupt, match="look at both hosts") as caught:
        read_journal(path)
    assert caught.value.offset_bytes == len(journal.MAGIC)


def test_a_long_unreadable_tail_is_no_torn_record(tmp_path: Path) -> None:
    path = tmp_path / "tail.log"
    longest = 8 + journal.MAX_BODY_BYTES
    content = written(path)
    path.write_bytes(content + bytes(longest))
    assert read_journal(path) == ENTRIES
    path.write_bytes(content + bytes(longest + 1))
    with pytest.raises(JournalCorrupt, match="more bytes"):
        read_journal(path)


def test_a_file_larger_than_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "huge.log"
    with path.open("wb") as huge:
        huge.truncate(journal.MAX_FILE_BYTES + 1)
    with pytest.raises(JournalCorrupt, match="larger"):
        read_journal(path)


def test_reopening_cuts_a_torn_record_off_and_goes_on(file: JournalFile) -> None:
    file.append(ENTRIES[0])
    with file.path.open("ab") as torn:
        torn.write(pack_entry(ENTRIES[1])[:-1])
    again, entries = JournalFile.reopen(file.path)
    assert entries == ENTRIES[:1]
    again.append(ENTRIES[2])
    again.close(ended=False)
    assert read_journal(file.path) == (ENTRIES[0], ENTRIES[2])


def test_reopening_a_file_cut_in_its_head_makes_an_empty_journal(file: JournalFile) -> None:
    file.path.write_bytes(journal.MAGIC[:3])
    again, entries = JournalFile.reopen(file.path)
    again.append(ENTRIES[0])
    again.close(ended=False)
    assert entries == ()
    assert read_journal(file.path) == ENTRIES[:1]


def test_reopening_a_damaged_journal_changes_nothing(file: JournalFile) -> None:
    content = written(file.path)
    damaged = content[:20] + b"?" + content[21:]
    file.path.write_bytes(damaged)
    with pytest.raises(JournalCorrupt):
        JournalFile.reopen(file.path)
    assert file.path.read_bytes() == damaged


def test_a_full_disk_is_said_in_plain_words_and_ends_the_journal() -> None:
    full = JournalFile(Path("/dev/full"), os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(JournalFailed, match="no room left"):
        full.append(ENTRIES[0])
    with pytest.raises(JournalFailed, match="takes no more entries"):
        full.append(ENTRIES[0])
    full.close(ended=False)


def test_an_entry_that_cannot_be_made_durable_is_not_taken_for_durable() -> None:
    # A pipe takes the bytes, and refuses to sync them.
    reader, writer = os.pipe()
    file = JournalFile(Path("pipe"), writer)
    with pytest.raises(JournalFailed):
        file.append(ENTRIES[0])
    file.close(ended=False)
    os.close(reader)


def test_a_state_directory_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(JournalFailed, match="cannot be kept"):
        JournalFile.create(tmp_path / "state", "m-1")


def test_open_journals_are_those_that_have_not_ended(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        file = JournalFile.create(tmp_path, name)
        file.append(ENTRIES[0])
        file.close(ended=name == "b")
    assert [path.stem for path in list_open(tmp_path)] == ["a", "c"]
    assert [path.stem for path in (tmp_path / "history").iterdir()] == ["b"]
    assert read_journal(tmp_path / "history" / "b.log")[-1].step == journal.ENDED


def test_no_state_directory_has_no_open_journals(tmp_path: Path) -> None:
    assert list_open(tmp_path / "none") == ()


def test_a_damaged_journal_stays_open(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "x.log").write_bytes(b"not a journal")
    assert [path.stem for path in list_open(tmp_path)] == ["x"]


def test_what_ended_but_was_not_moved_is_moved(tmp_path: Path) -> None:
    file = JournalFile.create(tmp_path, "m-1")
    file.append(JournalEntry(step=journal.ENDED, at_s=1.0))
    file.close(ended=False)
    assert list_open(tmp_path) == ()
    assert (tmp_path / "history" / "m-1.log").exists()


def test_closing_twice_does_nothing_more(tmp_path: Path) -> None:
    file = JournalFile.create(tmp_path, "m-1")
    file.close(ended=True)
    file.close(ended=True)
    with pytest.raises(JournalFailed, match="closed"):
        file.append(ENTRIES[0])


def test_the_history_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "HISTORY_FILES", 3)
    for number in range(5):
        file = JournalFile.create(tmp_path, f"m-{number}")
        os.utime(file.path, (number, number))
        file.append(ENTRIES[0])
        file.close(ended=True)
        os.utime(tmp_path / "history" / f"m-{number}.log", (number, number))
    kept = sorted(path.stem for path in (tmp_path / "history").iterdir())
    assert kept == ["m-2", "m-3", "m-4"]


@pytest.mark.parametrize("fact", [1.5, None, 2**64, ["list"], "\ud800"])
def test_facts_of_other_types_are_our_mistake(fact: object) -> None:
    with pytest.raises(ValueError, match="facts of step 'x'"):
        pack_entry(JournalEntry(step="x", at_s=0.0, facts={"fact": fact}))  # type: ignore[dict-item]


def test_a_clock_that_gives_no_number_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="facts of step"):
        pack_entry(JournalEntry(step="x", at_s=math.nan))


def test_the_largest_entry_is_kept_and_one_byte_more_is_not() -> None:
    def of(size_bytes: int) -> JournalEntry:
        return JournalEntry(step="x", at_s=0.0, facts={"blob": bytes(size_bytes)})

    overhead = len(pack_entry(of(40_000))) - 8 - 40_000
    pack_entry(of(journal.MAX_BODY_BYTES - overhead))
    with pytest.raises(ValueError, match="facts of step"):
        pack_entry(of(journal.MAX_BODY_BYTES - overhead + 1))


facts: st.SearchStrategy[dict[str, Fact]] = st.dictionaries(
    st.text(max_size=10),
    st.text(max_size=20) | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.booleans(),
    max_size=6,
)
entries = st.builds(
    JournalEntry,
    step=st.text(max_size=20),
    at_s=st.floats(allow_nan=False, allow_infinity=False),
    facts=facts,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(entries, max_size=5))
def test_entries_come_back_as_they_were(tmp_path: Path, some: list[JournalEntry]) -> None:
    path = tmp_path / "round-trip.log"
    written(path, tuple(some))
    assert read_journal(path) == tuple(some)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_garbage_raises_only_journal_corrupt(tmp_path: Path, garbage: bytes, has_head: bool) -> None:
    path = tmp_path / "garbage.log"
    path.write_bytes((journal.MAGIC if has_head else b"") + garbage)
    try:
        read_journal(path)
    except JournalCorrupt:
        return


@pytest.mark.anyio
async def test_a_procedure_appends_without_blocking_its_loop(tmp_path: Path) -> None:
    file = JournalFile.create(tmp_path, "m-1")
    steps = AsyncJournal(file)
    await steps.append("opened", guest="g-1", generation=7)
    await steps.append("committing", live=True)
    await steps.aclose(ended=True)
    entries = read_journal(tmp_path / "history" / "m-1.log")
    assert [entry.step for entry in entries] == ["opened", "committing", journal.ENDED]
    assert entries[0].facts == {"guest": "g-1", "generation": 7}


@pytest.mark.anyio
async def test_a_procedure_meets_the_full_disk(tmp_path: Path) -> None:
    steps = AsyncJournal(JournalFile(Path("/dev/full"), os.open("/dev/full", os.O_WRONLY)))
    with pytest.raises(JournalFailed, match="no room left"):
        await steps.append("opened")
    await steps.aclose(ended=False)
