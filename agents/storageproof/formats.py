"""Headers of disk images: which format it is, and what of a qcow2 image lies in other files. Pure.

Law: an image's content is its guest's, and hostile: nothing in it makes this fail but with FormatInvalid, and nothing
is believed beyond the limits here. Source: QEMU, docs/interop/qcow2.txt; the magic numbers of block/*.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

__all__ = ["HEAD_BYTES", "FormatInvalid", "Head", "Qcow2Header", "format_of", "parse_qcow2", "read_head"]

# What is read of an image: the header, its extensions and the name of the backing file are all in qcow2's first
# cluster, which has 64 KiB unless somebody chose otherwise.
HEAD_BYTES: Final = 64 << 10
# docs/interop/qcow2.txt, backing_file_size: "Maximum 1023 bytes".
MAX_NAME_BYTES: Final = 1023
# More than any release has.
MAX_EXTENSIONS: Final = 64
_QCOW2: Final = b"QFI\xfb"
_BACKING_FORMAT: Final = 0xE2792ACA
_DATA_FILE: Final = 0x44415441
_EXTERNAL_DATA: Final = 1 << 2
_MAGICS: Final = (
    (0, _QCOW2, "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)


class FormatInvalid(ValueError):
    """The image is not what its first bytes say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Header:
    """What of a qcow2 image matters to whoever opens it elsewhere. Names are as they stand in it, or empty."""

    version: int
    virtual_bytes: int
    snapshots: int
    backing: str = ""
    backing_format: str = ""
    data_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What an image's first bytes say. `error`: they are not what they begin as; `header` is None then, too."""

    format: str
    virtual_bytes: int
    snapshots: int = 0
    header: Qcow2Header | None = None
    error: str = ""


def read_head(head: bytes, size_bytes: int) -> Head:
    """Read the first bytes of an image that has `size_bytes`."""
    found = format_of(head)
    if found != "qcow2":
        return Head(format=found, virtual_bytes=size_bytes)
    try:
        header = parse_qcow2(head)
    except FormatInvalid as exc:
        return Head(format=found, virtual_bytes=size_bytes, error=str(exc))
    return Head(format=found, virtual_bytes=header.virtual_bytes, snapshots=header.snapshots, header=header)


def format_of(head: bytes) -> str:
    """Give the format that an image's first bytes are those of; `raw` is everything else."""
    return next((name for at, magic, name in _MAGICS if head[at : at + len(magic)] == magic), "raw")


def parse_qcow2(head: bytes) -> Qcow2Header:
    """Read a qcow2 header from an image's first `HEAD_BYTES`.

    Raises:
        FormatInvalid: theirs; it is none, or needs more than can be read here.
    """
    if len(head) < 72 or not head.startswith(_QCOW2):
        raise FormatInvalid("it has no qcow2 header")
    version, backing_at, backing_bytes, cluster_bits, virtual_bytes = struct.unpack_from(">IQIIQ", head, 4)
    (snapshots,) = struct.unpack_from(">I", head, 60)
    if version not in (2, 3) or not 9 <= cluster_bits <= 21:
        raise FormatInvalid(
            f"its qcow2 header is of version {version} with clusters of 2^{cluster_bits} bytes"
        )
    incompatible, extensions_at = 0, 72
    if version == 3:
        if len(head) < 104:
            raise FormatInvalid("its qcow2 header is cut")
        (incompatible,) = struct.unpack_from(">Q", head, 72)
        (extensions_at,) = struct.unpack_from(">I", head, 100)
        if not 104 <= extensions_at <= 4096:
            raise FormatInvalid(f"its qcow2 header has {extensions_at} bytes")
    # They end where the name of the backing file begins, or with the first cluster.
    end = min(backing_at or len(head), 1 << cluster_bits, len(head))
    extensions = _extensions(head[:end], extensions_at)
    data_file = extensions.get(_DATA_FILE, b"")
    if incompatible & _EXTERNAL_DATA and not data_file:
        raise FormatInvalid("its data is in another file, which it does not name")
    return Qcow2Header(
        version=version,
        virtual_bytes=min(virtual_bytes, (1 << 63) - 1),
        snapshots=snapshots,
        backing=_name(head, backing_at, backing_bytes) if backing_at else "",
        backing_format=_text(extensions.get(_BACKING_FORMAT, b"")),
        data_file=_text(data_file) if incompatible & _EXTERNAL_DATA else "",
    )


def _extensions(head: bytes, at: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for _ in range(MAX_EXTENSIONS):
        if at + 8 > len(head):
            return found
        kind, size = struct.unpack_from(">II", head, at)
        if kind == 0:
            return found
        if at + 8 + size > len(head):
            raise FormatInvalid(f"the extension {kind:#x} of its qcow2 header has {size} bytes")
        found[kind] = head[at + 8 : at + 8 + size]
        at += 8 + (size + 7) // 8 * 8
    raise FormatInvalid(f"its qcow2 header has more than {MAX_EXTENSIONS} extensions")


def _name(head: bytes, at: int, size: int) -> str:
    if not 0 < size <= MAX_NAME_BYTES or at + size > len(head):
        raise FormatInvalid(f"the name of its backing file has {size} bytes at {at}")
    return _text(head[at : at + size])


def _text(words: bytes) -> str:
    if len(words) > MAX_NAME_BYTES or b"\0" in words:
        raise FormatInvalid("a name in its qcow2 header is none")
    try:
        return words.decode()
    except UnicodeDecodeError as exc:
        raise FormatInvalid("a name in its qcow2 header is no UTF-8") from exc
