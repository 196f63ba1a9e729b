"""The storage that hosts share, through ordinary files: nonces beside disks, and ownership records.

Law: every path that a peer names is checked against this host's configured directories, links resolved, before
it is opened. A record is made whole or not at all: written aside, made durable, and linked to its name, which
fails if the name is taken. That is atomic on local file systems and on NFS from version 3 on.

Source: link(2), "EEXIST"; open(2) on O_EXCL and NFS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from migrate.errors import StorageFailed
from migrate.facts import DiskFacts, GuestFacts
from migrate.ownership import (
    MAX_RECORD_BYTES,
    Ownership,
    RecordInvalid,
    format_record,
    parse_record,
    record_name,
)
from migrate.preflight import Probe, Reading

__all__ = ["SharedDirs"]

OWNERSHIP_DIR: Final = ".vmferry"
NONCE_BYTES: Final = 32
# A probe's reader takes no more than this: the file is 32 bytes unless somebody plays games.
MAX_PROBE_BYTES: Final = 64
PROBE_PREFIX: Final = ".vmferry-probe-"
# Records of earlier generations that stay, for a person who looks: nothing decides by them.
KEPT_RECORDS: Final = 3
# A storage server that hangs must not hang the procedures: they say so and go on without it.
STORAGE_TIMEOUT_S: Final = 20.0
# Calls at once, those included that hang: more would only queue up in the storage server.
MAX_CALLS: Final = 16

_T = TypeVar("_T")


class SharedDirs:
    """`migrate.ports.SharedStorage` over the directories of this host's [storage] shared_dirs."""

    def __init__(self, shared_dirs: Sequence[Path], *, timeout_s: float = STORAGE_TIMEOUT_S) -> None:
        self._roots = tuple(Path(os.path.realpath(folder)) for folder in shared_dirs)
        self._timeout_s = timeout_s
        # Threads of its own: calls that hang must not take those that everything else needs.
        self._threads = anyio.CapacityLimiter(MAX_CALLS)
        self._staged: dict[tuple[str, Ownership], Path] = {}

    # ------------------------------------------------------------------ probes

    async def plant(self, disks: Sequence[DiskFacts]) -> tuple[tuple[Probe, ...], dict[str, bytes]]:
        """Write a fresh nonce beside each disk; disks where that fails are left out."""
        return await self._in_thread(lambda: self._plant(disks))

    async def read_probes(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        """Read what another host has planted. Paths are hostile."""
        return await self._in_thread(lambda: tuple(self._read_probe(probe) for probe in probes))

    async def clear(self, probes: Sequence[Probe]) -> None:
        """Take the nonces away again."""

        def clear_all() -> None:
            for probe in probes:
                # A nonce that stays behind is 32 bytes of litter, and no reason to end a migration.
                with contextlib.suppress(OSError):
                    Path(probe.path).unlink(missing_ok=True)

        await self._in_thread(clear_all)

    def _plant(self, disks: Sequence[DiskFacts]) -> tuple[tuple[Probe, ...], dict[str, bytes]]:
        probes: list[Probe] = []
        nonces: dict[str, bytes] = {}
        for disk in disks:
            nonce = secrets.token_bytes(NONCE_BYTES)
            path = Path(os.path.realpath(disk.path)).parent / f"{PROBE_PREFIX}{secrets.token_hex(8)}"
            try:
                _write_new(path, nonce)
            except OSError:
                continue  # no nonce for this disk is a finding of the preflight
            probes.append(Probe(disk=disk.name, path=str(path)))
            nonces[disk.name] = nonce
        return tuple(probes), nonces

    def _read_probe(self, probe: Probe) -> Reading:
        path = Path(probe.path)
        if "\0" in probe.path or not path.name.startswith(PROBE_PREFIX):
            return Reading(disk=probe.disk, content=None, error="the path is not one of a probe")
        if (problem := self._outside(path.parent)) is not None:
            return Reading(disk=probe.disk, content=None, error=problem)
        try:
            return Reading(disk=probe.disk, content=_read_regular(path, MAX_PROBE_BYTES), error=None)
        except OSError as exc:
            return Reading(disk=probe.disk, content=None, error=f"reading {path}: {exc.strerror}")

    # ------------------------------------------------------------------ ownership

    def ownership_dir(self, guest: GuestFacts) -> str:
        """Where the guest's records belong: beside its first disk, else in the first shared directory."""
        beside = Path(os.path.realpath(guest.disks[0].path)).parent if guest.disks else self._roots[0]
        return str(beside / OWNERSHIP_DIR)

    async def check_ownership_dir(self, directory: str) -> str | None:
        """Say why records cannot be kept there, or None. The path is hostile."""
        return await self._in_thread(lambda: self._check(directory))

    async def latest(self, directory: str, guest_id: str) -> Ownership | None:
        """Give the newest record. Raises StorageFailed, RecordInvalid."""
        return await self._in_thread(lambda: self._latest(directory, guest_id))

    async def claim(self, directory: str, wanted: Ownership) -> Ownership:
        """Create the record unless its generation is taken; give the one that stands now.

        Raises StorageFailed: nobody knows whether it was created.
        """
        staged = self._staged.pop((directory, wanted), None)
        return await self._in_thread(lambda: self._claim(directory, wanted, staged))

    async def stage_claim(self, directory: str, wanted: Ownership) -> None:
        """Write the record aside, durably: the claim then only links it. Raises StorageFailed."""
        if (directory, wanted) not in self._staged:
            aside = await self._in_thread(lambda: self._write_aside(Path(directory), wanted))
            self._staged[directory, wanted] = aside

    async def unstage_claim(self, directory: str, wanted: Ownership) -> None:
        """Take away what was staged. May be called twice."""
        if (aside := self._staged.pop((directory, wanted), None)) is not None:
            await self._in_thread(lambda: aside.unlink(missing_ok=True))

    async def tidy(self, directory: str, guest_id: str) -> None:
        """Clear away records that are older than the newest few."""
        await self._in_thread(lambda: self._tidy(directory, guest_id))

    def _check(self, directory: str) -> str | None:
        folder = Path(directory)
        if folder.name != OWNERSHIP_DIR:
            return f"{directory} is no {OWNERSHIP_DIR} directory"
        # The directory itself, not only the one above it: it may be a link to elsewhere.
        if (problem := self._outside(folder)) is not None:
            return problem
        try:
            folder.mkdir(mode=0o770, exist_ok=True)
            trial = folder / f".trial-{secrets.token_hex(8)}"
            # As large as a record may be: an empty file can be made on a disk that is full.
            _write_new(trial, bytes(MAX_RECORD_BYTES))
            trial.unlink()
        except OSError as exc:
            return f"writing in {directory}: {exc.strerror}"
        return None

    def _outside(self, folder: Path) -> str | None:
        if not folder.is_absolute() or "\0" in str(folder):
            return f"{str(folder)!r:.200} is no absolute path"
        resolved = Path(os.path.realpath(folder))
        if any(resolved.is_relative_to(root) for root in self._roots):
            return None
        return f"{folder} is in none of this host's shared directories ([storage] shared_dirs)"

    def _latest(self, directory: str, guest_id: str) -> Ownership | None:
        record_name(guest_id, 1)  # refuses an identity that could name something else
        folder = Path(directory)
        try:
            names = self._record_names(folder, guest_id)
            if not names:
                return None
            record = parse_record(_read_regular(folder / names[-1], MAX_RECORD_BYTES + 1))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StorageFailed(
                f"the ownership record in {directory} cannot be read: {exc.strerror}"
            ) from exc
        if record_name(record.guest_id, record.generation) != names[-1]:
            raise RecordInvalid(f"{folder / names[-1]} speaks of another guest or generation")
        return record

    def _record_names(self, folder: Path, guest_id: str) -> list[str]:
        digits = len(record_name(guest_id, 1)) - len(guest_id) - 1
        names = [
            name
            for name in os.listdir(folder)
            if name.startswith(f"{guest_id}.")
            and len(name) == len(guest_id) + 1 + digits
            and name[-digits:].isdecimal()
        ]
        return sorted(names)

    def _write_aside(self, folder: Path, wanted: Ownership) -> Path:
        aside = folder / f".claim-{secrets.token_hex(8)}"
        record_name(wanted.guest_id, wanted.generation)  # refuses what could not be linked
        try:
            folder.mkdir(mode=0o770, exist_ok=True)
            _write_new(aside, format_record(wanted))
        except OSError as exc:
            raise _not_made(folder, exc) from exc
        return aside

    def _claim(self, directory: str, wanted: Ownership, staged: Path | None) -> Ownership:
        folder = Path(directory)
        name = record_name(wanted.guest_id, wanted.generation)
        aside = staged or self._write_aside(folder, wanted)
        try:
            try:
                os.link(aside, folder / name)
            except FileExistsError:
                pass  # taken: by somebody else, or by ourselves and the answer was lost
            finally:
                aside.unlink()
            _sync_folder(folder)
        except OSError as exc:
            raise _not_made(folder, exc) from exc
        # A record of an older generation may have been made anew after it was cleared away: the newest counts.
        standing = self._latest(directory, wanted.guest_id)
        if standing is None:
            raise StorageFailed(f"{directory} does not show the record that was just made there")
        if standing.generation > wanted.generation:
            self._withdraw(folder / name, wanted)
        return standing

    def _withdraw(self, path: Path, wanted: Ownership) -> None:
        try:
            if parse_record(_read_regular(path, MAX_RECORD_BYTES + 1)) == wanted:
                path.unlink()
        except (OSError, RecordInvalid):
            pass  # an old record decides nothing; it is only untidy

    def _tidy(self, directory: str, guest_id: str) -> None:
        folder = Path(directory)
        # Nothing depends on it: what cannot be cleared away now will be after the next move.
        with contextlib.suppress(OSError):
            for name in self._record_names(folder, guest_id)[:-KEPT_RECORDS]:
                (folder / name).unlink()

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        """Run a blocking call; a server that hangs is StorageFailed, its thread is left to end by itself."""
        try:
            with anyio.fail_after(self._timeout_s):
                return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)
        except TimeoutError as exc:
            raise StorageFailed(f"the shared storage did not answer within {self._timeout_s:g} s") from exc


def _not_made(folder: Path, error: OSError) -> StorageFailed:
    return StorageFailed(
        f"the ownership record in {folder} cannot be made: {os.strerror(error.errno or errno.EIO)}"
    )


def _write_new(path: Path, content: bytes) -> None:
    """Make a file that was not there, durable before this returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o640)
    try:
        left = memoryview(content)
        while left:  # a file system with little room left takes a part, and says so only at the next write
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a small regular file; a link, device or pipe in its place is refused and never waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        return os.read(descriptor, max_bytes)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
