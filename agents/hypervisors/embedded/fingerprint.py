"""A fingerprint of all RAM by its content: holes and pages of zeros are the same.

Law: reads through the file, never through a mapping, so that holes stay holes.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

import numpy as np

from agents.hypervisors.embedded.spec import PAGE_BYTES

__all__ = ["ram_fingerprint"]

# Chunks lie at multiples of this, wherever the holes are: equal content makes equal calls of the hash.
_CHUNK_BYTES: Final = 1 << 20


def ram_fingerprint(fd: int, ram_bytes: int) -> bytes:
    """Give 32 bytes that are equal exactly for RAMs of equal size and content; it must not change meanwhile."""
    digest = hashlib.sha256(ram_bytes.to_bytes(8, "little"))
    scratch = bytearray(_CHUNK_BYTES)
    position = 0
    while position < ram_bytes:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole follows
            break
        position = data // _CHUNK_BYTES * _CHUNK_BYTES
        got = os.preadv(fd, [memoryview(scratch)[: min(_CHUNK_BYTES, ram_bytes - position)]], position)
        words = np.frombuffer(scratch, np.uint64, count=got // 8).reshape(-1, PAGE_BYTES // 8)
        kept = np.flatnonzero(words.any(axis=1))
        if kept.size:
            digest.update((kept.astype("<i8") + position // PAGE_BYTES).tobytes())
            digest.update((words if kept.size == len(words) else words[kept]).data)
        position += _CHUNK_BYTES
    return digest.digest()
