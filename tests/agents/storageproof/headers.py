"""Headers of images, as their formats have them."""

from __future__ import annotations

import struct

__all__ = ["header"]


def header(
    *, version: int = 3, backing: bytes = b"", cluster_bits: int = 16, extensions: bytes = bytes(8)
) -> bytes:
    """A qcow2 header as docs/interop/qcow2.txt has it."""
    at = 104 + len(extensions)
    fixed = struct.pack(
        ">4sIQIIQ", b"QFI\xfb", version, at if backing else 0, len(backing), cluster_bits, 1 << 20
    )
    fixed = fixed.ljust(72, b"\0") + bytes(28) + struct.pack(">I", 104)
    return fixed + extensions + backing
