"""Ownership records in files beside a guest's disks: one file a generation, made by link(2).

Law: a record is written aside, made durable, and linked to its name, which fails if the name is taken. That is atomic
on local file systems and on NFS from version 3 on. Only that decides; a listing may be some seconds old. What a claim
did is found out by reading, also when the answer to it was lost, and nobody is told that a record stands before its
name is durable.

    DISKS/.vmferry/GUEST.000000000007                records; the newest counts
    DISKS/.vmferry/.claim-GUEST.000000000008-RANDOM  one that may be linked; nothing decides by it

Source: link(2), "EEXIST"; RFC 1813, 3.3.15.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from agents.ownership import fileops
from agents.ownership.threads import StorageThreads
from migrate.errors import NotRecorded, StorageFailed
from migrate.ownership import (
    MAX_RECORD_BYTES,
    Ownership,
    RecordInvalid,
    format_record,
    parse_record,
    record_name,
)

__all__ = ["KEPT_RECORDS", "OWNERSHIP_DIR", "FileRecords", "outside"]

OWNERSHIP_DIR: Final = ".vmferry"
# Records of earlier generations that stay, for a person who looks: nothing decides by them.
KEPT_RECORDS: Final = 3
_ASIDE: Final = ".claim-"
_TRIAL: Final = ".trial-"


class FileRecords:
    """Records below this host's [storage] shared_dirs; `roots` are those, links resolved."""

    def __init__(self, roots: Sequence[Path], threads: StorageThreads) -> None:
        self._roots = tuple(roots)
        self._threads = threads
        self._staged: dict[tuple[str, Ownership], Path] = {}

    async def check(self, directory: str, guest_id: str) -> str | None:
        """Say why records of a guest cannot be kept there, or None. Both are hostile."""
        return await self._threads.run(lambda: self._check(directory, guest_id))

    async def latest(self, directory: str, guest_id: str) -> Ownership | None:
        """Give the newest record. Raises StorageFailed, RecordInvalid."""
        return await self._threads.run(lambda: self._latest(Path(directory), guest_id))

    async def claim(self, directory: str, wanted: Ownership) -> Ownership:
        """Create the record unless its generation is taken; give the one that stands now.

        Raises StorageFailed: nobody knows whether it was created; NotRecorded: it was not, and will not be.
        """
        staged = self._staged.pop((directory, wanted), None)
        return await self._threads.run(lambda: self._claim(Path(directory), wanted, staged))

    async def stage_claim(self, directory: str, wanted: Ownership) -> None:
        """Write the record aside, durably: the claim then only links it. Raises StorageFailed, RecordInvalid."""
        if (directory, wanted) not in self._staged:
            aside = await self._threads.run(lambda: self._write_aside(Path(directory), wanted))
            self._staged[directory, wanted] = aside

    async def unstage_claim(self, directory: str, wanted: Ownership) -> None:
        """Take away what was staged. May be called twice; what cannot be taken away is `tidy`'s."""
        if (aside := self._staged.pop((directory, wanted), None)) is not None:
            await self._threads.run(lambda: fileops.discard(aside))

    async def tidy(self, directory: str, guest_id: str) -> None:
        """Clear away records that are older than the newest few, and claims that can no longer be made."""
        await self._threads.run(lambda: self._tidy(Path(directory), guest_id))

    # ------------------------------------------------------------------ blocking

    def _check(self, directory: str, guest_id: str) -> str | None:
        folder = Path(directory)
        try:
            record_name(guest_id, 1)
        except RecordInvalid as exc:
            return str(exc)
        if folder.name != OWNERSHIP_DIR:
            return f"{directory!r:.200} is no {OWNERSHIP_DIR} directory"
        # The directory itself, not only the one above it: it may be a link to elsewhere.
        if (problem := outside(folder, self._roots)) is not None:
            return problem
        try:
            fileops.make_folder(folder)
            # As large as a record may be: an empty file can be made on a disk that is full.
            trial = fileops.write_new(folder, f"{_TRIAL}{guest_id}-", bytes(MAX_RECORD_BYTES))
            linked = folder / f"{trial.name}-linked"
            try:
                fileops.link_new(trial, linked)
            finally:
                fileops.discard(trial)
                fileops.discard(linked)
        except OSError as exc:
            return f"writing in {directory}: {_reason(exc)}"
        return None

    def _latest(self, folder: Path, guest_id: str) -> Ownership | None:
        record_name(guest_id, 1)  # refuses an identity that could name something else
        try:
            for _ in range(fileops.TRIES):
                names = _record_names(folder, guest_id)
                if not names:
                    return None
                try:
                    return _read(folder / names[-1])
                except FileNotFoundError:
                    continue  # cleared away since it was listed: there is a newer one
        except OSError as exc:
            raise StorageFailed(f"the ownership record in {folder} cannot be read: {_reason(exc)}") from exc
        raise StorageFailed(f"the ownership records in {folder} are listed and cannot be found")

    def _write_aside(self, folder: Path, wanted: Ownership) -> Path:
        name = record_name(wanted.guest_id, wanted.generation)  # refuses what could not be linked
        if wanted.generation > 1:
            self._insist_on_records(folder, wanted)
        try:
            if wanted.generation == 1:
                fileops.make_folder(folder)
            return fileops.write_new(folder, f"{_ASIDE}{name}-", format_record(wanted))
        except OSError as exc:
            raise _not_made(folder, exc) from exc

    def _insist_on_records(self, folder: Path, wanted: Ownership) -> None:
        """Refuse to go on where nobody began: the storage is not mounted here, or it is another one.

        A claim in an empty directory would succeed on every host that has one.
        """
        latest = self._latest(folder, wanted.guest_id)
        if latest is None or latest.generation < wanted.generation - 1:
            raise StorageFailed(
                f"{folder} does not show generation {wanted.generation - 1} of the ownership record, which was made "
                "there: is the shared storage mounted on this host?"
            )

    def _claim(self, folder: Path, wanted: Ownership, staged: Path | None) -> Ownership:
        path = folder / record_name(wanted.guest_id, wanted.generation)
        failure: OSError | None = None
        try:
            self._link(path, wanted, staged)
        except OSError as exc:
            failure = exc  # it may have been made all the same: reading tells
        standing = self._standing(path, wanted)
        if standing is None and failure is not None and fileops.is_refusal(failure):
            raise NotRecorded(_sentence(folder, failure)) from failure
        if standing is None:
            raise _not_made(folder, failure or FileNotFoundError(f"{path} cannot be found")) from failure
        try:
            fileops.sync_folder(folder)
        except OSError as exc:
            raise _not_made(folder, exc) from exc
        if standing.generation > wanted.generation:
            self._withdraw(path, wanted)
        return standing

    def _link(self, path: Path, wanted: Ownership, staged: Path | None) -> None:
        try:
            aside = staged or self._write_aside(path.parent, wanted)
        except StorageFailed as exc:
            raise NotRecorded(str(exc)) from exc  # nothing was linked
        try:
            fileops.link_new(aside, path)
        except FileNotFoundError as exc:
            if staged is None:
                raise
            # What was staged has been cleared away meanwhile; or the answer is a second one to a link that was made.
            try:
                self._link(path, wanted, None)
            except NotRecorded:
                raise exc from None
        finally:
            fileops.discard(aside)

    def _standing(self, path: Path, wanted: Ownership) -> Ownership | None:
        """Give the record of the wanted generation, or of a newer one; None: there is neither."""
        newest = self._latest(path.parent, wanted.guest_id)
        if newest is not None and newest.generation >= wanted.generation:
            return newest
        # NFS may show a listing from before the link. The name itself is asked of the server.
        try:
            return _read(path)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise _not_made(path.parent, exc) from exc

    def _withdraw(self, path: Path, wanted: Ownership) -> None:
        try:
            if _read(path) == wanted:
                fileops.discard(path)
        except (OSError, RecordInvalid):
            pass  # an old record decides nothing; it is only untidy

    def _tidy(self, folder: Path, guest_id: str) -> None:
        try:
            records = _record_names(folder, guest_id)
            names = fileops.names_in(folder)
        except OSError:
            return  # nothing depends on it: what cannot be cleared away now will be after the next move
        for name in records[:-KEPT_RECORDS]:
            fileops.discard(folder / name)
        for name in names:
            # What is left of a storage that failed. A claim of the next generation may still be wanted.
            is_late = records and name[len(_ASIDE) :][: len(records[-1])] <= records[-1]
            if (is_late and _is_claim_of(name, guest_id)) or name.startswith(f"{_TRIAL}{guest_id}-"):
                fileops.discard(folder / name)


def outside(folder: Path, roots: Sequence[Path]) -> str | None:
    """Say why a folder that a peer has named is not below one of `roots`, or None. Blocks."""
    if not folder.is_absolute() or "\0" in str(folder):
        return f"{str(folder)!r:.200} is no absolute path"
    try:
        resolved = fileops.resolve(folder)
    except OSError as exc:
        return f"{str(folder)!r:.200}: {_reason(exc)}"
    if any(resolved.is_relative_to(root) for root in roots):
        return None
    return f"{folder} is in none of this host's shared directories ([storage] shared_dirs)"


def _read(path: Path) -> Ownership:
    """Read the record of this name. Raises OSError, RecordInvalid."""
    record = parse_record(fileops.read_small(path, MAX_RECORD_BYTES + 1))
    if record_name(record.guest_id, record.generation) != path.name:
        raise RecordInvalid(f"{path} speaks of another guest or generation")
    return record


def _record_names(folder: Path, guest_id: str) -> list[str]:
    """List a guest's records, oldest first."""
    shape = re.compile(re.escape(guest_id) + r"\.[0-9]{12}", re.ASCII)
    return sorted(name for name in fileops.names_in(folder) if shape.fullmatch(name))


def _is_claim_of(name: str, guest_id: str) -> bool:
    shape = re.escape(f"{_ASIDE}{guest_id}.") + r"[0-9]{12}-[0-9a-f]+"
    return re.fullmatch(shape, name, re.ASCII) is not None


def _not_made(folder: Path, error: OSError) -> StorageFailed:
    return StorageFailed(_sentence(folder, error))


def _sentence(folder: Path, error: OSError) -> str:
    return f"the ownership record in {folder} cannot be made: {_reason(error)}"


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
