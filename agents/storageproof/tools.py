"""The programs that are asked about a disk: each is a process that has ANSWERS_WITHIN_S, and speaks English."""

from __future__ import annotations

import os
import subprocess
from types import MappingProxyType
from typing import Final

__all__ = ["ANSWERS_WITHIN_S", "run"]

# Less than the storage's own bound (`agents.ownership.threads`) for the few of them together: the reason is known then.
ANSWERS_WITHIN_S: Final = 2.0
_QEMU_TOOLS: Final = "Debian: qemu-utils, Fedora: qemu-img"
_PACKAGES: Final = MappingProxyType(
    {
        "qemu-img": _QEMU_TOOLS,
        "qemu-io": _QEMU_TOOLS,
        "virsh": "Debian: libvirt-clients, Fedora: libvirt-client",
    }
)


def run(*words: str, silent: str) -> subprocess.CompletedProcess[bytes]:
    """Give what one has said and how it ended. Blocks. Nothing that it is told is read by a shell.

    Raises:
        OSError: it is not here, or has not answered in time, which `silent` says; `strerror` is a sentence.
    """
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWERS_WITHIN_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as exc:
        raise OSError(0, f"{words[0]} is not installed here ({_PACKAGES[words[0]]})") from exc
    except subprocess.TimeoutExpired as exc:
        raise OSError(0, silent) from exc
