"""The one capability that the agent may have, and who gets it: the child that takes a dirty log, and no guest.

A service manager gives it as an ambient capability, which every program that is started inherits, QEMU too. So the
agent takes it out of the ambient set at its start, keeps it itself, and puts it back for that one child alone.
Capabilities belong to threads: what is said here holds for the thread that says it, and for those that it starts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["CAP_SYS_PTRACE", "handed_down", "keep_from_children"]

# include/uapi/linux/capability.h, include/uapi/linux/prctl.h
CAP_SYS_PTRACE: Final = 19
_PR_CAP_AMBIENT: Final = 47
_RAISE: Final = 2
_LOWER: Final = 3
_CLEAR_ALL: Final = 4

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def keep_from_children() -> None:
    """Call at the start, before there are threads: programs that are started inherit no capability."""
    _ambient(_CLEAR_ALL, 0)


@contextmanager
def handed_down(capability: int = CAP_SYS_PTRACE) -> Iterator[None]:
    """Programs that this thread starts in the block have it, if this process has and may hand it down."""
    is_raised = _ambient(_RAISE, capability)
    try:
        yield
    finally:
        if is_raised:
            _ambient(_LOWER, capability)


def _ambient(what: int, capability: int) -> bool:
    """Give whether the kernel did it; it refuses what this process does not have itself."""
    return bool(_prctl(_PR_CAP_AMBIENT, what, capability, 0, 0) == 0)
