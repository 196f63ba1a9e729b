"""Block devices of files, for as long as a block lasts."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.needs import NotHere, need_root

__all__ = ["loop_of"]


@contextmanager
def loop_of(path: Path) -> Iterator[str]:
    """Give a block device of this file. Raises NotHere: none can be made on this machine."""
    need_root()
    done = subprocess.run(["losetup", "-f", "--show", path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHere("no loop device can be made here")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
