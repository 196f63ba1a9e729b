"""Nonces beside disks: written at the source, read at the destination, which writes its own behind it for the source.

Law: a probe is the source's, which made it and clears it: a destination makes no file, so that it leaves none when the
link dies. It writes into a regular file of a probe's name and size, and of one name, below its shared directories only.
The source holds a lock on it meanwhile. A probe is looked for beside the disk as *this* host finds it: what was read is
then in the very directory that the guest's disk would be opened from.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agents.ownership import fileops
from agents.ownership.files import outside
from agents.storageproof import images, locks
from agents.storageproof.places import SharedPlaces
from agents.storageproof.sectors import MAX_OFFSETS, choose_offsets
from migrate.facts import DiskFacts, DiskKind, ImageFacts
from migrate.preflight import LockAnswer, Probe, Reading

__all__ = [
    "MAX_PROBES",
    "MAX_PROBE_BYTES",
    "NONCE_BYTES",
    "PROBE_PREFIX",
    "Planted",
    "answer",
    "look",
    "plant",
]

NONCE_BYTES: Final = 32
# A probe's reader takes no more than this: the source's nonce and the destination's.
MAX_PROBE_BYTES: Final = 2 * NONCE_BYTES
PROBE_PREFIX: Final = ".vmferry-probe-"
# A guest of any driver has fewer disks; each costs some reads.
MAX_PROBES: Final = 128


@dataclass(slots=True)
class Planted:
    """What a source has to clear: its files, and the descriptors that hold their locks."""

    probes: list[Probe] = field(default_factory=list)
    nonces: dict[str, bytes] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)


def plant(disks: list[DiskFacts], places: SharedPlaces) -> Planted:
    """Write a fresh nonce beside each disk that is a file, lock it, and choose what to compare of the disk. Blocks."""
    planted = Planted()
    for disk in disks[:MAX_PROBES]:
        if disk.kind is DiskKind.EMPTY or not disk.path:
            continue
        size_bytes, is_block = images.size_at(disk.path, places)
        path, error = "", ""
        # A file alone has a place beside it.
        if not is_block and disk.kind is not DiskKind.NETWORK:
            nonce = secrets.token_bytes(NONCE_BYTES)
            try:
                path = str(fileops.write_new(Path(os.path.realpath(disk.path)).parent, PROBE_PREFIX, nonce))
                planted.nonces[disk.name] = nonce
                _hold(path, planted)
            except OSError as exc:
                error = exc.strerror or str(exc)
        planted.probes.append(
            Probe(
                disk=disk.name,
                path=path,
                image=disk.path,
                offsets=choose_offsets(size_bytes),
                is_locked=path in planted.held,
                is_read_only=disk.is_read_only,
                error=error,
            )
        )
    return planted


def look(probe: Probe, places: SharedPlaces) -> Reading:
    """Look at a probe of this host's own, and at its disk, which the guest has open here already. Blocks."""
    image = _image(probe, places, is_read_only=True)
    content, error = None, probe.error or None
    if probe.path:
        try:
            content = fileops.read_small(Path(probe.path), MAX_PROBE_BYTES)
        except OSError as exc:
            error = exc.strerror or str(exc)
    return Reading(
        disk=probe.disk,
        content=content and content[:NONCE_BYTES],
        error=error,
        image=image,
        echo=(content or b"")[NONCE_BYTES:],
    )


def answer(probe: Probe, places: SharedPlaces) -> Reading:
    """Read what another host has planted, write a nonce behind it, and try its lock. All of it is hostile. Blocks."""
    image = _image(probe, places, is_read_only=probe.is_read_only) if probe.image else None
    if image is not None and not probe.path:
        return Reading(disk=probe.disk, content=None, error=None, image=image)
    path = Path(probe.path)
    if "\0" in probe.path or not path.name.startswith(PROBE_PREFIX):
        return Reading(disk=probe.disk, content=None, error="the path is not one of a probe", image=image)
    if image is not None:
        if not probe.image.startswith("/") or "\0" in probe.image:
            return Reading(disk=probe.disk, content=None, error=image.error, image=image)
        path = Path(os.path.realpath(probe.image)).parent / path.name
    if (problem := outside(path.parent, places.roots)) is not None:
        return Reading(disk=probe.disk, content=None, error=problem, image=image)
    try:
        content = fileops.read_small(path, MAX_PROBE_BYTES)
    except OSError as exc:
        return Reading(
            disk=probe.disk, content=None, error=f"reading {path}: {exc.strerror or exc}", image=image
        )
    if len(content) != NONCE_BYTES or not probe.image:
        return Reading(disk=probe.disk, content=content, error=None, image=image)
    echo, echo_error, lock, lock_error = _echo(path, try_lock=probe.is_locked)
    return Reading(
        disk=probe.disk,
        content=content,
        error=None,
        image=image,
        echo=echo,
        echo_error=echo_error,
        lock=lock,
        lock_error=lock_error,
    )


def _image(probe: Probe, places: SharedPlaces, *, is_read_only: bool) -> ImageFacts:
    return images.look_at(probe.image, places, offsets=probe.offsets[:MAX_OFFSETS], is_read_only=is_read_only)


def _hold(path: str, planted: Planted) -> None:
    """Hold a lock on a probe, if its file system has any."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        # The other agent may be of another user and of the same group; the mask of this process forgets that.
        os.fchmod(descriptor, 0o660)
    except OSError:
        return
    try:
        locks.hold(descriptor)
    except OSError:
        os.close(descriptor)
    else:
        planted.held[path] = descriptor


def _echo(path: Path, *, try_lock: bool) -> tuple[bytes, str, LockAnswer, str]:
    """Write a nonce behind the one in a probe; try the lock that its owner says it holds."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        return b"", exc.strerror or str(exc), LockAnswer.UNTRIED, exc.strerror or str(exc)
    lock, lock_error = LockAnswer.UNTRIED, ""
    try:
        facts = os.fstat(descriptor)
        # A file of several names is somebody's who calls it a probe.
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_size != NONCE_BYTES:
            return b"", "it is not one file of a probe's size", lock, ""
        echo = secrets.token_bytes(NONCE_BYTES)
        try:
            if try_lock:
                lock = LockAnswer.REFUSED if locks.is_refused(descriptor) else LockAnswer.GRANTED
        except OSError as exc:
            lock_error = exc.strerror or str(exc)
        try:
            written = os.pwrite(descriptor, echo, NONCE_BYTES)
            os.fsync(descriptor)
        except OSError as exc:
            return b"", exc.strerror or str(exc), lock, lock_error
        if written != NONCE_BYTES:
            return b"", "there is no room for it", lock, lock_error
        return echo, "", lock, lock_error
    finally:
        os.close(descriptor)
