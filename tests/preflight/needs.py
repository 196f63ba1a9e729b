"""What a case needs of the machine that it plays on: a skip with the reason where that is missing, a failure in CI."""

from __future__ import annotations

import glob
import os
import shutil

__all__ = ["NotHere", "need_file", "need_program", "need_root"]


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
