"""What an agent was about to do: one append-only file per migration, durable before each step it announces.

Law: everything here blocks, and belongs in a worker thread; only AsyncJournal sees to that itself. An entry is
durable when `append` returns and never before; a step that cannot be undone is taken only after that. The
journal decides nothing: `migrate.ownership` does, with the entries that are read here at restart.

    STATE_DIR/journal/MIGRATION_ID.log     migrations that have not ended
    STATE_DIR/history/MIGRATION_ID.log     the last 1000 that have

File:  +--------+----------+  then records, to the end of the file:
       | magic  | version  |  +----------------+-------------+--------------------------+
       | 7 B    | 1 B      |  | length u32 LE  | crc32 u32 LE| body: msgpack array      |
       +--------+----------+  |                | over both   | [step, at_s, facts]      |
                              +----------------+-------------+--------------------------+

The crc covers length and body, so that neither can be damaged alone. A crash while a record is written leaves a
torn record at the end: it was never durable, its step was never taken, and reading stops before it. The same
damage before the end is no crash's doing, and is said with its offset.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

import anyio
import anyio.to_thread
import msgpack

from agents.errors import JournalCorrupt
from migrate.errors import JournalFailed

__all__ = ["AsyncJournal", "Fact", "JournalEntry", "JournalFile", "list_open", "read_journal"]

Fact = str | int | bytes | bool

MAGIC: Final = b"vmfjrnl\x01"
_HEAD: Final = struct.Struct("<II")
# An entry is a step's name and a few identities; 64 KiB is far above and far below what would hurt to read.
MAX_BODY_BYTES: Final = 64 << 10
MAX_FACTS: Final = 64
# A migration writes about ten entries; a file of this size is something else, and is not read into memory.
MAX_FILE_BYTES: Final = 16 << 20
# Some months of moves on a busy host, and a folder that is still quick to list.
HISTORY_FILES: Final = 1000
# A file name, so neither a path nor hidden.
_MIGRATION_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
# The last step of every journal in the history.
ENDED: Final = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """One step. `at_s` is the host's clock (seconds since 1970), for people: nothing is decided by it."""

    step: str
    at_s: float
    facts: dict[str, Fact] = field(default_factory=dict)


class JournalFile:
    """The journal of one running migration, and its only writer."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `create` or `reopen`."""
        self.path = path
        self._descriptor: int | None = descriptor
        self._is_broken = False

    @classmethod
    def create(cls, state_dir: Path, migration_id: str) -> JournalFile:
        """Begin the journal of a new migration; its name is durable when this returns.

        Raises:
            JournalFailed: the disk refuses, or a migration of that identity has a journal already.
            ValueError: `migration_id` is no file name (ours: identities that peers choose are checked before).
        """
        path = _journal_path(state_dir, migration_id)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o600)
        except OSError as exc:
            _raise_failed(path, exc)
        try:
            _write_all(descriptor, MAGIC)
            os.fdatasync(descriptor)
            _sync_folder(path.parent)
            _sync_folder(state_dir)
        except OSError as exc:
            os.close(descriptor)
            # What was not made whole is taken back: a journal without a migration would be asked about for ever.
            with contextlib.suppress(OSError):
                path.unlink()
            _raise_failed(path, exc)
        return cls(path, descriptor)

    @classmethod
    def reopen(cls, path: Path) -> tuple[JournalFile, tuple[JournalEntry, ...]]:
        """Go on with a journal after a restart: cut off a torn record, and give the entries before it.

        Raises:
            JournalCorrupt: it is damaged before its last record; nothing was changed.
            JournalFailed: the disk refuses.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as exc:
            _raise_failed(path, exc)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(os.close, descriptor)
            entries, whole_bytes = _parse(path, _read(path))
            try:
                os.ftruncate(descriptor, whole_bytes)
                if whole_bytes == 0:
                    _write_all(descriptor, MAGIC)
                os.fdatasync(descriptor)
            except OSError as exc:
                _raise_failed(path, exc)
            on_failure.pop_all()
        return cls(path, descriptor), entries

    def append(self, entry: JournalEntry) -> None:
        """Write one entry; it is durable when this returns.

        After a failure the file may end in a torn record, so the journal takes no more entries.

        Raises:
            JournalFailed: the disk refuses: the step that was announced must not be taken.
            ValueError: the entry is larger than any reader accepts, or holds other types (ours).
        """
        record = pack_entry(entry)
        if self._descriptor is None or self._is_broken:
            raise JournalFailed(f"journal {self.path} takes no more entries: it is closed, or a write failed")
        try:
            _write_all(self._descriptor, record)
            os.fdatasync(self._descriptor)
        except OSError as exc:
            self._is_broken = True
            _raise_failed(self.path, exc)

    def close(self, *, ended: bool) -> None:
        """Let go of the file; with `ended`, mark the migration as ended and move the file to the history.

        May be called twice; the second call does nothing.

        Raises:
            JournalFailed: the mark or the move is not durable; at restart the migration looks unfinished,
                which is asked about again and never wrong.
        """
        if self._descriptor is None:
            return
        try:
            if ended:
                self.append(JournalEntry(step=ENDED, at_s=time.time()))
        finally:
            os.close(self._descriptor)
            self._descriptor = None
        if ended:
            _archive(self.path)


class AsyncJournal:
    """A JournalFile as the migrations' procedures want it: `migrate.ports.Journal`."""

    def __init__(self, file: JournalFile) -> None:
        """`file` is used by nobody else from now on."""
        self._file = file
        self._one_at_a_time = anyio.Lock()

    async def append(self, step: str, **facts: Fact) -> None:
        """Return when the entry is durable. A cancellation waits for the disk: half a write helps nobody.

        Raises:
            JournalFailed: the step must not be taken.
        """
        entry = JournalEntry(step=step, at_s=time.time(), facts=facts)
        async with self._one_at_a_time:
            await anyio.to_thread.run_sync(self._file.append, entry)

    async def aclose(self, *, ended: bool) -> None:
        """As JournalFile.close(), and also when the caller is cancelled: it is bounded by the disk alone."""
        with anyio.CancelScope(shield=True):
            async with self._one_at_a_time:
                await anyio.to_thread.run_sync(lambda: self._file.close(ended=ended))


def pack_entry(entry: JournalEntry) -> bytes:
    """Write one record.

    Raises:
        ValueError: no reader would accept it (ours).
    """
    try:
        body: bytes = msgpack.packb([entry.step, float(entry.at_s), entry.facts])
    except (TypeError, OverflowError, ValueError) as exc:
        raise ValueError(f"the facts of step {entry.step!r} cannot be written: {exc}") from exc
    if len(body) > MAX_BODY_BYTES or _unpack_body(body) != entry:
        raise ValueError(f"the facts of step {entry.step!r} would not be read again as they are")
    length = struct.pack("<I", len(body))
    return length + struct.pack("<I", zlib.crc32(body, zlib.crc32(length))) + body


def read_journal(path: Path) -> tuple[JournalEntry, ...]:
    """Read all entries that were durable. A torn last record is left out.

    Raises:
        JournalCorrupt: damaged before its last record, or no journal.
        JournalFailed: it cannot be read.
    """
    return _parse(path, _read(path))[0]


def list_open(state_dir: Path) -> tuple[Path, ...]:
    """Give the journals of migrations that have not ended, sorted by name.

    A journal that is damaged counts as open: somebody must look at it. One that is marked as ended but was
    not moved to the history, because the agent died in between, is moved now.

    Raises:
        JournalFailed: a journal cannot be read or moved.
    """
    is_open = []
    for path in sorted((state_dir / "journal").glob("*.log")):
        try:
            entries = read_journal(path)
        except JournalCorrupt:
            is_open.append(path)
            continue
        if entries and entries[-1].step == ENDED:
            _archive(path)
        else:
            is_open.append(path)
    return tuple(is_open)


def _archive(path: Path) -> None:
    history = path.parent.parent / "history"
    try:
        history.mkdir(mode=0o700, exist_ok=True)
        path.rename(history / path.name)
        _sync_folder(history)
        _sync_folder(path.parent)
    except OSError as exc:
        _raise_failed(path, exc)
    # Forgetting may fail: then the history is longer than it should be, and nothing else is wrong.
    with contextlib.suppress(OSError):
        by_age = sorted(history.glob("*.log"), key=lambda ended: ended.stat().st_mtime_ns, reverse=True)
        for ended in by_age[HISTORY_FILES:]:
            ended.unlink(missing_ok=True)


def _parse(path: Path, content: bytes) -> tuple[tuple[JournalEntry, ...], int]:
    """Give the entries and the number of bytes they and the head of the file take: 0 when it has no whole head."""
    if len(content) < len(MAGIC) and MAGIC.startswith(content):
        return (), 0
    if not content.startswith(MAGIC):
        raise JournalCorrupt(path, 0, "it does not begin as a journal of this version does")
    entries: list[JournalEntry] = []
    offset = len(MAGIC)
    while offset < len(content):
        record = _record_at(content, offset)
        if record is None:
            _check_is_torn(path, content, offset)
            break
        body, offset_after = record
        entry = _unpack_body(body)
        if entry is None:
            raise JournalCorrupt(path, offset, "an undamaged record that this version does not understand")
        entries.append(entry)
        offset = offset_after
    return tuple(entries), offset


def _record_at(content: bytes, offset: int) -> tuple[bytes, int] | None:
    """Give the body of the whole, undamaged record at `offset` and where the next begins; None: there is none."""
    if offset + _HEAD.size > len(content):
        return None
    length, crc = _HEAD.unpack_from(content, offset)
    end = offset + _HEAD.size + length
    if length > MAX_BODY_BYTES or end > len(content):
        return None
    body = content[offset + _HEAD.size : end]
    if zlib.crc32(body, zlib.crc32(content[offset : offset + 4])) != crc:
        return None
    return body, end


def _check_is_torn(path: Path, content: bytes, offset: int) -> None:
    """Only one record at a time is written, so a torn one is short, and no whole record follows it."""
    if len(content) - offset > _HEAD.size + MAX_BODY_BYTES:
        raise JournalCorrupt(path, offset, "more bytes than one record has cannot be read")
    for later in range(offset + 1, len(content)):
        # Zeros, which some file systems leave after a crash, are no record: the crc of a length of 0 is not 0.
        if _record_at(content, later) is not None:
            raise JournalCorrupt(path, offset, f"a record cannot be read, but one at byte {later} can")


def _unpack_body(body: bytes) -> JournalEntry | None:
    try:
        unpacked = msgpack.unpackb(body, strict_map_key=True)
    except (ValueError, msgpack.UnpackException):
        return None
    match unpacked:
        case [str(step), float(at_s), dict(facts)] if len(facts) <= MAX_FACTS and math.isfinite(at_s):
            if all(
                isinstance(name, str) and isinstance(fact, str | int | bytes) for name, fact in facts.items()
            ):
                return JournalEntry(step=step, at_s=at_s, facts=facts)
    return None


def _journal_path(state_dir: Path, migration_id: str) -> Path:
    if not _MIGRATION_ID.fullmatch(migration_id):
        raise ValueError(f"{migration_id!r} cannot be the name of a journal")
    return state_dir / "journal" / f"{migration_id}.log"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            # A read allocates what it asks for: the limit itself would be 16 MiB for a file of some hundred bytes.
            content = file.read(min(os.fstat(file.fileno()).st_size, MAX_FILE_BYTES) + 1)
    except OSError as exc:
        _raise_failed(path, exc)
    if len(content) > MAX_FILE_BYTES:
        raise JournalCorrupt(path, MAX_FILE_BYTES, f"it is larger than {MAX_FILE_BYTES} bytes")
    return content


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_failed(path: Path, exc: OSError) -> NoReturn:
    match exc.errno:
        case errno.ENOSPC | errno.EDQUOT:
            words = f"there is no room left for the journal {path}; free some space on that file system"
        case errno.EROFS:
            words = f"the journal {path} is on a file system that is read-only now"
        case errno.EACCES | errno.EPERM:
            words = f"this user may not use the journal {path}; see who owns its folder"
        case errno.EEXIST:
            words = f"there is a journal {path} already: a migration has that identity"
        case _:
            words = f"the journal {path} cannot be kept: {exc.strerror or exc}"
    raise JournalFailed(words) from exc
