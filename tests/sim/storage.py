"""The shared storage of a world: a record for each guest, failures before or after, and claims that come late."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import anyio

from migrate.errors import NotRecorded, StorageFailed
from migrate.facts import DiskFacts, GuestFacts
from migrate.ownership import Ownership
from migrate.preflight import Probe, Reading
from tests.migrate.world import IMAGE, StorageOfHost
from tests.sim.lives import LIFE, step

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["LATEST_CLAIM_S", "SimStorage"]

# How long the storage may hold a claim of an agent that has died, and record it then.
LATEST_CLAIM_S: Final = 30.0


class SimStorage:
    """`migrate.ports.SharedStorage` of one host."""

    def __init__(self, world: World, host: str) -> None:
        self._world = world
        self._host = host

    def _of(self, guest_id: str) -> StorageOfHost:
        return self._world.records[guest_id].seen_from(self._host)

    async def _may_fail(self) -> None:
        await anyio.sleep(self._world.rng.uniform(0, 0.02))
        step()
        if self._world.storage_is_down or self._world.happens(self._world.faults.storage):
            raise StorageFailed("the storage does not answer")

    async def plant(self, disks: Sequence[DiskFacts]) -> tuple[tuple[Probe, ...], dict[str, bytes]]:
        step()
        nonces = {disk.name: self._world.rng.randbytes(16) for disk in disks}
        for disk in disks:
            self._world.files[f"{disk.path}.{self._host}.probe"] = nonces[disk.name]
        return tuple(
            Probe(disk=disk.name, path=f"{disk.path}.{self._host}.probe", image=disk.path) for disk in disks
        ), nonces

    async def look(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        return await self.read_probes(probes)

    async def read_probes(self, probes: Sequence[Probe]) -> tuple[Reading, ...]:
        step()
        image = replace(IMAGE, digests=())
        return tuple(
            Reading(
                disk=probe.disk,
                content=self._world.files.get(probe.path),
                error=None,
                image=image,
                echo=b"echo",
            )
            for probe in probes
        )

    async def clear(self, probes: Sequence[Probe]) -> None:
        step()
        for probe in probes:
            self._world.files.pop(probe.path, None)

    async def ownership_dir(self, guest: GuestFacts) -> str:
        return f"/shared/{guest.guest_id}"

    async def check_ownership_dir(self, directory: str, guest: GuestFacts) -> str | None:
        return None

    async def latest(self, directory: str, guest_id: str) -> Ownership | None:
        await self._may_fail()
        return await self._of(guest_id).latest(directory, guest_id)

    async def claim(self, directory: str, wanted: Ownership) -> Ownership:
        what = f"claim of generation {wanted.generation} for {wanted.owner}"
        step(f"before {what}")
        try:
            await self._may_fail()
        except StorageFailed as exc:
            if self._world.happens(0.5):
                raise NotRecorded("the storage refused") from exc
            raise
        finally:
            # Asked for, and its agent died: nobody hears of it, and it may come yet.
            life = LIFE.get()
            if life is not None and life.is_over and self._world.happens(self._world.faults.late_claims):
                self._world.later(LATEST_CLAIM_S, self._record_late, directory, wanted)
        standing = await self._of(wanted.guest_id).claim(directory, wanted)
        step(f"after {what}")
        await self._may_fail()
        return standing

    async def _record_late(self, directory: str, wanted: Ownership) -> None:
        standing = await self._of(wanted.guest_id).claim(directory, wanted)
        if standing == wanted:
            self._world.tell(f"generation {wanted.generation} of {wanted.guest_id} is recorded late")

    async def stage_claim(self, directory: str, wanted: Ownership) -> None:
        await self._may_fail()

    async def unstage_claim(self, directory: str, wanted: Ownership) -> None:
        await self._may_fail()

    async def tidy(self, directory: str, guest_id: str) -> None:
        with contextlib.suppress(StorageFailed):
            await self._may_fail()
            await self._of(guest_id).tidy(directory, guest_id)
