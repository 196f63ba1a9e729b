"""The images under an image: those that its header names, theirs, and so on, each checked before it is opened.

Law: a header is its guest's word. What it names is opened only where this host's configuration allows disks.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from agents.storageproof.formats import HEAD_BYTES, FormatInvalid, Qcow2Header, format_of, parse_qcow2
from agents.storageproof.places import SharedPlaces
from agents.storageproof.sectors import digests_at, open_image
from migrate.facts import BackingFacts

__all__ = ["MAX_CHAIN", "head_of", "under"]

# Snapshots of a year's weeks; libvirt takes 200, QEMU has no limit but the stack. A chain that names itself ends here.
MAX_CHAIN: Final = 64


def head_of(path: Path) -> bytes:
    """Read what `formats` wants of an image. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, HEAD_BYTES, 0)
    finally:
        os.close(descriptor)


def under(path: Path, header: Qcow2Header, places: SharedPlaces) -> tuple[tuple[BackingFacts, ...], str]:
    """Give what is under the image at `path` (links resolved), the nearest first, and why that is not all."""
    found: list[BackingFacts] = []
    # A backing file's own format counts, not what its first bytes say: a raw one is its guest's to write.
    waiting = _named_in(header)
    folder = path.parent
    while waiting:
        name, declared = waiting.pop(0)
        if len(found) == MAX_CHAIN:
            return tuple(found), f"there are more than {MAX_CHAIN} images under it"
        one, below = _look(folder, name, declared, places)
        found.append(one)
        if below is not None:
            header, folder = below
            waiting += _named_in(header)
    return tuple(found), ""


def _named_in(header: Qcow2Header) -> list[tuple[str, str]]:
    return [
        *([(header.data_file, "raw")] if header.data_file else []),
        *([(header.backing, header.backing_format)] if header.backing else []),
    ]


def _look(
    folder: Path, name: str, declared: str, places: SharedPlaces
) -> tuple[BackingFacts, tuple[Qcow2Header, Path] | None]:
    """Look at one image under another; what its own header names is found from its own folder."""
    if ":" in name.split("/")[0]:
        return BackingFacts(path=name[:1024], error=f"{name[:200]} is no file, and is not looked at"), None
    wanted = name if name.startswith("/") else f"{folder}/{name}"
    try:
        path = places.locate(wanted)
        head = head_of(path)
        descriptor, _ = open_image(path)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) and not stat.S_ISBLK(facts.st_mode):
                raise OSError(0, "is no file and no block device")
            (digest,) = digests_at(descriptor, (0,))
        finally:
            os.close(descriptor)
        format_ = declared or format_of(head)
        below = (parse_qcow2(head), path.parent) if format_ == "qcow2" else None
    except FormatInvalid as exc:
        return BackingFacts(path=wanted, error=f"{wanted}: {exc}"), None
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        return BackingFacts(path=wanted, error=f"{wanted}: {why}"), None
    return (
        BackingFacts(path=wanted, size_bytes=facts.st_size, format=format_of(head), digest=digest),
        below,
    )
