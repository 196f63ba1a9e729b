"""What a case needs of its machine: a skip with the reason, which begins with "needs" where CI has it."""

from __future__ import annotations

import glob
import os
import shutil

__all__ = ["NotHere", "need_file", "need_fuse", "need_program", "need_root"]


class NotHere(Exception):
    """The case cannot be played on this machine."""


def need_root() -> None:
    if os.geteuid() != 0:
        raise NotHere("needs root")


def need_program(name: str) -> str:
    """Give the path of a program."""
    path = shutil.which(name)
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
