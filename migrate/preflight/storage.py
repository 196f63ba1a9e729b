"""The disks and the ownership record: the same objects at both ends, proved and not believed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.facts import DiskKind, ImageFacts
from migrate.preflight.disks import Disk, disks_of
from migrate.preflight.evidence import RECORDS, Inspection
from migrate.preflight.report import Check, Finding, Severity

__all__ = ["CHECKS", "CONTENT", "OWNERSHIP", "STORAGE", "is_another", "judge"]

STORAGE: Final = Check(
    check_id="storage",
    asked="Is each disk the same object at both ends?",
    why="A guest that goes on with another disk, or with a copy of its own, destroys its file systems. "
    "A file is proved by nonces that each end writes beside it and the other reads, in the directory that "
    "both reach the file from; a block device by what it says of itself; a disk with a URL by the address that its "
    "server's name has on each host",
    remedy="Mount the same shared storage at the same path on both hosts, and name it in [storage] shared_dirs of both",
)
CONTENT: Final = Check(
    check_id="disk-content",
    asked="Has each disk the same size and the same content at both ends?",
    why="Two disks of one name may differ in what is in them. Some sectors are read past the hosts' caches: at the "
    "source, at the destination, and at the source again, because the guest goes on writing; only those that did not "
    "change meanwhile are compared",
    remedy="Find out which storage each host has mounted or attached there",
)
OWNERSHIP: Final = Check(
    check_id="ownership",
    asked="Do both ends keep the guest's ownership record in the same place?",
    why="The record is what makes exactly one copy go on when a link or an agent dies",
    remedy="Give both agents write access to the directory on the shared storage, or to the same etcd",
)
CHECKS: Final = (STORAGE, CONTENT, OWNERSHIP)

_ATTACH: Final = (
    "Attach the same device at the same path on both hosts. A device without a world-wide name, a serial number or a "
    "device-mapper UUID cannot be proved: give it one"
)
_SERVE: Final = (
    "Let both hosts reach the server, and name the URL in [storage] network_disks of both; it must take the clients of "
    "two hosts at once"
)
# What each host is to itself, in the identity of a URL.
_OWN_ADDRESSES: Final = ("//127.", "//[::1]")


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge each disk, then the place of the ownership record."""
    disks = disks_of(inspection)
    for disk in disks:
        yield _same_object(inspection, disk)
        yield from _same_content(inspection, disk)
    if not disks:
        yield STORAGE.ok(f"{inspection.guest.name} has no disk")
        yield CONTENT.ok(f"{inspection.guest.name} has no disk")
    yield _ownership(inspection)


def is_another(inspection: Inspection, disk: Disk) -> bool:
    """Tell whether both ends have not shown that the disk is one object, and need to."""
    return _same_object(inspection, disk).severity is Severity.REFUSED


def _same_object(inspection: Inspection, disk: Disk) -> Finding:
    host, facts = inspection.host.name, disk.facts
    if facts.kind is DiskKind.EMPTY or (facts.kind is DiskKind.CDROM and not facts.path):
        return STORAGE.ok(f"{disk} is an empty drive")
    if disk.is_remote:
        return _same_server(inspection, disk)
    if disk.here.is_block or disk.there.is_block:
        cause = _other_device(inspection, disk)
        if cause is None:
            return STORAGE.ok(
                f"{disk} is the device {_device(disk.there)} on {inspection.source_host} and on {host}"
            )
        return STORAGE.refused(f"{disk} is not proved to be the same on {host}: {cause}", _ATTACH)
    cause = _other_file(inspection, disk)
    if cause is None:
        return STORAGE.ok(
            f"{disk}: a nonce written beside it was read on {host}, and one of {host} here; both reach it there"
        )
    if disk.is_harmless and disk.nonce is None and disk.probe is not None and disk.probe.error:
        # Nothing can be written where it lies, and nobody can damage it: its content is what counts.
        return STORAGE.warning(f"{disk} is read-only, and is proved by its content alone: {cause}")
    return STORAGE.refused(f"{disk} is not proved to be the same on {host}: {cause}")


def _other_file(inspection: Inspection, disk: Disk) -> str | None:
    """Say what lacks of the proof that both ends have one file."""
    host, source = inspection.host.name, inspection.source_host
    if disk.nonce is None:
        why = f" ({disk.probe.error})" if disk.probe is not None and disk.probe.error else ""
        return f"no nonce could be written beside it at the source{why}"
    if disk.reading is None:
        return f"{host} did not answer for it"
    if disk.reading.error is not None:
        return disk.reading.error
    if disk.reading.content != disk.nonce:
        return f"{host} read something else than was written at the source"
    if not disk.reading.echo:
        return (
            f"{host} could not write its own nonce beside it: {disk.reading.echo_error or 'no reason given'}"
        )
    if disk.after is None or disk.after.echo != disk.reading.echo:
        return f"{source} read something else beside it than {host} had written"
    for name, image in ((source, disk.here), (host, disk.there)):
        if image.error:
            return f"{name} could not look at it: {image.error}"
        if image.is_covered:
            return f"on {name} another file is mounted over it, or it is one of a mount of its own"
    if disk.here.name != disk.there.name:
        return f"it leads to {disk.here.name} on {source} and to {disk.there.name} on {host}"
    return None


def _other_device(inspection: Inspection, disk: Disk) -> str | None:
    """Say what lacks of the proof that both ends have one block device."""
    host, source = inspection.host.name, inspection.source_host
    here, there = disk.here, disk.there
    for name, image in ((source, here), (host, there)):
        if image.error:
            return f"{name} could not look at it: {image.error}"
    if here.is_block is not there.is_block:
        return f"it is a {_kind(here)} on {source} and a {_kind(there)} on {host}"
    if here.kernel and here.kernel == there.kernel:
        if here.device == there.device:
            return None
        return f"it is the device {_device(here)} on {source} and {_device(there)} on {host}, of one kernel"
    if not here.identity or not there.identity:
        nameless = source if not here.identity else host
        return f"nothing tells the device from others on {nameless}: it has no world-wide name and no serial number"
    if here.identity.startswith("loop:") or there.identity.startswith("loop:"):
        return f"it is a loop device ({here.identity} and {there.identity}), which each host makes of a file by itself"
    if here.identity != there.identity:
        return f"it is {here.identity} on {source} and {there.identity} on {host}"
    return None


def _same_server(inspection: Inspection, disk: Disk) -> Finding:
    """A URL is the same on both hosts; what counts is where it leads. Its content is compared as that of any disk."""
    host, source = inspection.host.name, inspection.source_host
    here, there = disk.here, disk.there
    for name, image in ((source, here), (host, there)):
        if image.error:
            return STORAGE.refused(f"{name} does not reach {disk}: {image.error}", _SERVE)
    if here.identity != there.identity:
        return STORAGE.warning(
            f"{disk} leads to {here.identity} from {source} and to {there.identity} from {host}: its content alone "
            "tells whether that is one server",
            "Make sure that they are addresses of one server",
        )
    if any(own in here.identity for own in _OWN_ADDRESSES) and not disk.is_on_one_machine:
        return STORAGE.refused(
            f"{disk} leads to {here.identity}, which is each host itself", "Name the server by its address"
        )
    return STORAGE.ok(f"{disk} is served at {here.identity} to {source} and to {host}")


def _kind(image: ImageFacts) -> str:
    return "block device" if image.is_block else "file"


def _device(image: ImageFacts) -> str:
    return f"{image.identity or 'without a name'} ({image.device})"


def _same_content(inspection: Inspection, disk: Disk) -> Iterator[Finding]:
    host, source = inspection.host.name, inspection.source_host
    if not disk.is_somewhere:
        yield CONTENT.ok(f"{disk} has no content")
        return
    before, after, there = disk.here, disk.here_after, disk.there
    if before.error or after.error or there.error:
        found = before.error or after.error or there.error
        yield CONTENT.refused(f"{disk} could not be compared: {found}")
        return
    # A file that grows meanwhile may have any size between the two.
    if (
        not min(before.size_bytes, after.size_bytes)
        <= there.size_bytes
        <= max(before.size_bytes, after.size_bytes)
    ):
        yield CONTENT.refused(
            f"{disk} has {after.size_bytes} bytes on {source} and {there.size_bytes} on {host}"
        )
        return
    offsets = disk.probe.offsets if disk.probe is not None else ()
    if not len(offsets) == len(before.digests) == len(after.digests) == len(there.digests):
        yield CONTENT.refused(f"{disk} could not be compared: {host} did not read what it was asked to")
        return
    still = [
        (offset, mine, other)
        for offset, mine, again, other in zip(
            offsets, before.digests, after.digests, there.digests, strict=True
        )
        if mine and mine == again
    ]
    different = [str(offset) for offset, mine, other in still if mine != other]
    if different:
        yield CONTENT.refused(
            f"{disk} has other content on {host} than on {source}, at byte {', '.join(different)}"
        )
    elif still or not offsets:
        yield CONTENT.ok(
            f"{disk} has {there.size_bytes} bytes on both hosts, and the same in {len(still)} sectors of "
            f"{len(offsets)} that were compared"
        )
    else:
        yield CONTENT.unknown(
            f"{disk} has {there.size_bytes} bytes on both hosts; every sector that was compared changed meanwhile",
            "Nothing, if the disk is proved to be the same object; else ask again",
        )


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
            "Name the endpoints of the same etcd, and the same prefix, in [storage.etcd] of both hosts; without etcd "
            "the same directory first in [storage] shared_dirs",
        )
    return OWNERSHIP.ok("both ends keep the same ownership record")
