"""The disks and the ownership record: the same objects at both ends, proved and not believed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.preflight.evidence import RECORDS, Inspection
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "OWNERSHIP", "STORAGE", "judge"]

STORAGE: Final = Check(
    check_id="storage",
    asked="Is each disk the same object at both ends?",
    why="A guest that goes on with another disk, or with a copy of its own, destroys its file systems",
    remedy="Mount the same shared storage at the same path on both hosts, and name it in [storage] shared_dirs of both",
)
OWNERSHIP: Final = Check(
    check_id="ownership",
    asked="Do both ends keep the guest's ownership record in the same place?",
    why="The record is what makes exactly one copy go on when a link or an agent dies",
    remedy="Give both agents write access to the directory on the shared storage, or to the same etcd",
)
CHECKS: Final = (STORAGE, OWNERSHIP)


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge each disk, then the place of the ownership record."""
    host = inspection.host
    readings = {reading.disk: reading for reading in inspection.readings}
    for disk in inspection.guest.disks:
        reading = readings.get(disk.name)
        nonce = inspection.nonces.get(disk.name)
        if reading is not None and nonce is not None and reading.content == nonce:
            yield STORAGE.ok(
                f"disk {disk.name} ({disk.path}): a nonce written beside it was read on {host.name}"
            )
            continue
        if nonce is None:
            cause = "no nonce could be written beside it at the source"
        elif reading is None:
            cause = f"{host.name} did not answer for it"
        elif reading.error is not None:
            cause = reading.error
        else:
            cause = f"{host.name} read something else than was written at the source"
        yield STORAGE.refused(
            f"disk {disk.name} ({disk.path}) is not proved to be the same on {host.name}: {cause}"
        )
    yield _ownership(inspection)


def _ownership(inspection: Inspection) -> Finding:
    host = inspection.host
    if inspection.ownership_error is not None:
        return OWNERSHIP.refused(
            f"{host.name} cannot keep the ownership record: {inspection.ownership_error}"
        )
    nonce = inspection.nonces.get(RECORDS)
    reading = next((one for one in inspection.readings if one.disk == RECORDS), None)
    if nonce is not None and (reading is None or reading.content != nonce):
        cause = (reading and reading.error) or "it found something else than was written at the source"
        return OWNERSHIP.refused(
            f"{host.name} is not proved to keep the ownership record in the same place: {cause}",
            "Name the endpoints of the same etcd, and the same prefix, in [storage.etcd] of both hosts",
        )
    return OWNERSHIP.ok("both ends keep the same ownership record")
