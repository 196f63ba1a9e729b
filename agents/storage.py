"""The storage that hosts share: nonces beside disks, and where a guest's ownership records are kept.

Law: every path that a peer names is checked against this host's configured directories, links resolved, before it is
opened. Where records live follows from the guest's first disk and this host's configuration, never from what a peer
says: a peer that names another place is refused.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import anyio

from agents.ownership import fileops
from agents.ownership.files import OWNERSHIP_DIR, FileRecords, outside
from agents.ownership.place import ETCD
from agents.ownership.threads import STORAGE_TIMEOUT_S, StorageThreads
from agents.storageproof.places import SharedPlaces
from agents.storageproof.probes import (
    MAX_PROBE_BYTES,
    MAX_PROBES,
    NONCE_BYTES,
    PROBE_PREFIX,
    Planted,
    answer,
    look,
    plant,
)
from migrate.errors import StorageFailed
from migrate.facts import DiskFacts, GuestFacts, ImageFacts
from migrate.ownership import Ownership, RecordInvalid
from migrate.preflight import RECORDS, Probe, Reading

__all__ = ["RecordStore", "SharedDirs", "SharedRecords"]


class RecordStore(Protocol):
    """One way to keep records. `directory` is a place in it."""

    async def check(self, directory: str, guest_id: str) -> str | None:
        """Say why records of a guest cannot be kept there, or None. Both are hostile."""
        ...

    async def latest(self, directory: str, guest_id: str) -> Ownership | None: ...
    async def claim(self, directory: str, wanted: Ownership) -> Ownership: ...
    async def stage_claim(self, directory: str, wanted: Ownership) -> None: ...
    async def unstage_claim(self, directory: str, wanted: Ownership) -> None: ...
    async def tidy(self, directory: str, guest_id: str) -> None: ...


class SharedRecords(RecordStore, Protocol):
    """Records in a store that is no file system: one place for all guests."""

    async def place(self) -> str:
        """Give the place, which begins with the store's name. Raises StorageFailed."""
        ...

    async def plant(self, nonce: bytes) -> str: ...
    async def read_probe(self, probe: str) -> bytes | None: ...
    async def clear_probe(self, probe: str) -> None: ...
    async def aclose(self) -> None: ...


class SharedDirs:
    """`migrate.ports.SharedStorage` over the directories of this host's [storage] shared_dirs.

    `libvirt` is whom the preflight asks for storage pools, if anybody.
    `etcd` has the records of guests whose first disk is no file below one of them; without it they are in the first.
    """

    def __init__(
        self,
        shared_dirs: Sequence[Path],
        *,
        shared_devices: Sequence[str] = (),
        network_disks: Sequence[str] = (),
        libvirt: str = "",
        timeout_s: float = STORAGE_TIMEOUT_S,
        etcd: SharedRecords | None = None,
    ) -> None:
        self._places = SharedPlaces.of(shared_dirs, shared_devices, network_disks, libvirt)
        self._roots = self._places.roots
        # The locks of probes that are planted, by their paths.
        self._held: dict[str, int] = {}
        self._threads = StorageThreads(timeout_s)
        self._files = FileRecords(self._roots, self._threads)
        self._etcd = etcd

    async def aclose(self) -> None:
        """Close the connections to etcd. May be called twice."""
        if self._etcd is not None:
            await self._etcd.aclose()

    # ------------------------------------------------------------------ probes

    async def plant(self, disks: Sequence[DiskFacts]) -> tuple[tuple[Probe, ...], dict[str, bytes]]:
        """Write a fresh nonce beside each disk that is a file, and where the records are if that is elsewhere."""
        planted, is_elsewhere = await self._threads.run(lambda: self._plant(disks))
        if is_elsewhere and self._etcd is not None:
            planted.nonces[RECORDS] = nonce = secrets.token_bytes(NONCE_BYTES)
            with contextlib.suppress(StorageFailed):
                planted.probes.append(Probe(disk=RECORDS, path=await self._etcd.plant(nonce)))
        self._held |= planted.held
        return tuple(planted.probes), planted.nonces

    async def look(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        """Read what this host has planted, and what the other end has written behind it; look at the disks."""
        return await self._each(look, [probe for probe in probes if probe.image])

    async def read_probes(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        """Read what another host has planted, and write behind it. Paths are hostile."""
        files = [probe for probe in probes if not probe.path.startswith(ETCD)][:MAX_PROBES]
        readings = await self._each(answer, files)
        # One guest has one such probe; whoever sends more is answered once.
        for probe in [probe for probe in probes if probe.path.startswith(ETCD)][:1]:
            readings = (*readings, await self._read_in_etcd(probe))
        return readings

    async def clear(self, probes: Sequence[Probe]) -> None:
        """Take the nonces away again. One that stays is 64 bytes of litter, and no reason to end a migration."""

        held = [self._held.pop(probe.path) for probe in probes if probe.path in self._held]

        def clear_all() -> None:
            for descriptor in held:  # before the name goes: NFS keeps what is open under another one
                os.close(descriptor)
            for probe in probes:
                if probe.path and not probe.path.startswith(ETCD):
                    fileops.discard(Path(probe.path))

        with contextlib.suppress(StorageFailed):
            await self._threads.run(clear_all)
        for probe in probes:
            if self._etcd is not None and probe.path.startswith(ETCD):
                with contextlib.suppress(StorageFailed):
                    await self._etcd.clear_probe(probe.path)

    async def _each(
        self, read: Callable[[Probe, SharedPlaces], Reading], probes: Sequence[Probe]
    ) -> tuple[Reading, ...]:
        """Read each probe by itself: a storage that hangs is the finding of its own disks."""
        readings: dict[int, Reading] = {}

        async def read_one(number: int, probe: Probe) -> None:
            try:
                readings[number] = await self._threads.run(lambda: read(probe, self._places))
            except StorageFailed as exc:
                image = ImageFacts(error=str(exc)) if probe.image else None
                readings[number] = Reading(disk=probe.disk, content=None, error=str(exc), image=image)

        async with anyio.create_task_group() as tasks:
            for number, probe in enumerate(probes):
                tasks.start_soon(read_one, number, probe)
        return tuple(readings[number] for number in range(len(probes)))

    def _plant(self, disks: Sequence[DiskFacts]) -> tuple[Planted, bool]:
        """Plant in files; also tell whether the records are beside no disk."""
        is_elsewhere = self._beside_first(disks) is None
        planted = plant(list(disks), self._places)
        if is_elsewhere and self._etcd is None:
            planted.nonces[RECORDS] = nonce = secrets.token_bytes(NONCE_BYTES)
            with contextlib.suppress(OSError):
                path = fileops.write_new(self._roots[0], PROBE_PREFIX, nonce)
                planted.probes.append(Probe(disk=RECORDS, path=str(path)))
        return planted, is_elsewhere

    async def _read_in_etcd(self, probe: Probe) -> Reading:
        if self._etcd is None:
            return Reading(
                disk=probe.disk, content=None, error="this host has no [storage.etcd] in its configuration"
            )
        try:
            content = await self._etcd.read_probe(probe.path)
        except StorageFailed as exc:
            return Reading(disk=probe.disk, content=None, error=str(exc))
        error = (
            None if content is not None else "this host's etcd does not have what was written at the source"
        )
        return Reading(disk=probe.disk, content=content and content[:MAX_PROBE_BYTES], error=error)

    # ------------------------------------------------------------------ ownership

    async def ownership_dir(self, guest: GuestFacts) -> str:
        """Where the guest's records belong: beside a first disk that is a file, else in etcd or the first directory.

        Raises StorageFailed: its disk cannot be looked at, or etcd does not answer.
        """
        if (beside := await self._threads.run(lambda: self._beside_first(guest.disks))) is not None:
            return beside
        return self._first_dir if self._etcd is None else await self._etcd.place()

    async def check_ownership_dir(self, directory: str, guest: GuestFacts) -> str | None:
        """Say why this guest's records cannot be kept there, or None. All of it is hostile."""
        if directory.startswith(ETCD):
            if self._etcd is None:
                return f"they are in etcd ({directory[:200]}), and this host has no [storage.etcd] in its configuration"
            return await self._etcd.check(directory, guest.guest_id)
        is_elsewhere = await self._threads.run(lambda: self._beside_first(guest.disks)) is None
        if is_elsewhere and self._etcd is not None:
            return (
                f"this host keeps the records of such guests in etcd, and the other named "
                f"{directory[:200]}: it has no [storage.etcd] in its configuration"
            )
        if is_elsewhere and Path(directory) != Path(self._first_dir):
            return (
                f"this host keeps the records of guests without a disk file in {self._first_dir}, and the other "
                f"in {directory[:200]}: name the same directory first in [storage] shared_dirs of both"
            )
        return await self._files.check(directory, guest.guest_id)

    async def latest(self, directory: str, guest_id: str) -> Ownership | None:
        """Give the newest record. Raises StorageFailed, RecordInvalid."""
        record = await self._store(directory).latest(directory, guest_id)
        if record is None and directory.startswith(ETCD):
            await self._insist_on_no_older(guest_id)
        return record

    async def claim(self, directory: str, wanted: Ownership) -> Ownership:
        """Create the record unless its generation is taken; give the one that stands now.

        Raises StorageFailed: nobody knows whether it was created; NotRecorded: it was not, and will not be.
        """
        return await self._store(directory).claim(directory, wanted)

    async def stage_claim(self, directory: str, wanted: Ownership) -> None:
        """Do beforehand what of a claim can be. Raises StorageFailed, RecordInvalid."""
        await self._store(directory).stage_claim(directory, wanted)

    async def unstage_claim(self, directory: str, wanted: Ownership) -> None:
        """Take away what was staged. May be called twice."""
        await self._store(directory).unstage_claim(directory, wanted)

    async def tidy(self, directory: str, guest_id: str) -> None:
        """Clear away what is older than the newest few records; what cannot be now will be another time."""
        # A record that cannot be read is said when it is asked for; the guest that runs here does not depend on it.
        with contextlib.suppress(StorageFailed, RecordInvalid):
            await self._store(directory).tidy(directory, guest_id)

    def _beside_first(self, disks: Sequence[DiskFacts]) -> str | None:
        """Give the directory for records beside the first disk, or None where they belong elsewhere. Blocks."""
        beside = _beside_first_disk(disks)
        if beside is not None and self._etcd is not None and outside(Path(beside), self._roots) is not None:
            return None
        return beside

    @property
    def _first_dir(self) -> str:
        return str(self._roots[0] / OWNERSHIP_DIR)

    def _store(self, directory: str) -> RecordStore:
        if not directory.startswith(ETCD):
            return self._files
        if self._etcd is None:
            raise StorageFailed(f"the record is in {directory}, and this host has no [storage.etcd] any more")
        return self._etcd

    async def _insist_on_no_older(self, guest_id: str) -> None:
        """A guest without a record in etcd may have one from before this host had etcd: that one still counts."""
        older = await self._files.latest(self._first_dir, guest_id)
        if older is not None:
            raise StorageFailed(
                f"etcd has no record of this guest, and {self._first_dir} has one from before: generation "
                f"{older.generation} belongs to {older.owner}. Make sure that it runs there and nowhere else, then "
                f"remove {self._first_dir}/{guest_id}.*"
            )


def _beside_first_disk(disks: Sequence[DiskFacts]) -> str | None:
    """Give the ownership directory beside the first disk, or None where that is no file. Paths are hostile."""
    path = disks[0].path if disks else ""
    if not path.startswith("/") or "\0" in path:
        return None
    try:
        is_device = stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        is_device = False
    except OSError as exc:
        raise StorageFailed(f"{path} cannot be looked at: {exc.strerror}") from exc
    return None if is_device else str(Path(os.path.realpath(path)).parent / OWNERSHIP_DIR)
