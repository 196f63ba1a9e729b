"""Small files that the kernel makes up when they are read: /proc and /sys.

Law: what is not there, or may not be read, is empty; nobody reads more of one than was asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["MOST_BYTES", "text_of"]

MOST_BYTES: Final = 64 << 10


def text_of(path: Path, most_bytes: int = MOST_BYTES, *, encoding: str = "utf-8") -> str:
    """Give a file's text; what is no text in it is replaced."""
    try:
        with path.open("rb") as file:
            return file.read(most_bytes).decode(encoding, "replace")
    except OSError:
        return ""
