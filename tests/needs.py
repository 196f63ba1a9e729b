"""What a test needs of its machine: a skip with the reason, which begins with "needs" where CI has it."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

__all__ = ["NotHere", "need_file", "need_fuse", "need_program", "need_root", "skipped_where_not_here"]


class NotHere(Exception):
    """It cannot be done on this machine."""


@contextmanager
def skipped_where_not_here() -> Iterator[None]:
    """Skip a test whose block raises NotHere."""
    try:
        yield
    except NotHere as exc:
        pytest.skip(str(exc))


def need_root() -> None:
    if os.geteuid() != 0:
        raise NotHere("needs root")


def need_program(name: str) -> str:
    """Give the path of a program; a server's may be where only root looks for it."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise NotHere(f"needs {name}")
    return path


def need_file(package: str, pattern: str) -> str:
    """Give the path of a file of a package."""
    found = glob.glob(pattern)
    if not found:
        raise NotHere(f"needs the package {package}")
    return found[0]


def need_fuse(name: str) -> str:
    """Give the path of a program that serves a file system."""
    if not os.path.exists("/dev/fuse"):
        raise NotHere("this machine has no FUSE")
    return need_program(name)
