"""The programs that are asked about a disk: each is a process that has ANSWERS_WITHIN_S, and speaks English."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

__all__ = ["ANSWERS_WITHIN_S", "Server", "run", "serving"]

# Less than the storage's own bound (`agents.ownership.threads`) for the few of them together: the reason is known then.
ANSWERS_WITHIN_S: Final = 2.0
_LOOKS_EVERY_S: Final = 0.01
# From when its socket is closed until it is gone.
_ENDS_WITHIN_S: Final = 0.5
# prctl(2), PR_SET_PDEATHSIG: the thread that has started it is the one that waits in the block.
_ENDS_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL")
_QEMU_TOOLS: Final = "Debian: qemu-utils, Fedora: qemu-img"
_PACKAGES: Final = MappingProxyType(
    {
        "qemu-img": _QEMU_TOOLS,
        "qemu-io": _QEMU_TOOLS,
        "qemu-nbd": _QEMU_TOOLS,
        "setpriv": "util-linux",
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
            env=_english(),
        )
    except FileNotFoundError as exc:
        raise _not_here(words[0]) from exc
    except subprocess.TimeoutExpired as exc:
        raise OSError(0, silent) from exc


@dataclass(frozen=True, slots=True)
class Server:
    """A qemu-nbd; `url` is what it serves, to a client that has waited until the image is open."""

    url: str
    _process: subprocess.Popen[bytes]
    _said: Path

    def last_words(self) -> str | None:
        """Give all that it has said, if it has ended or is about to, as it does where it cannot open the image."""
        try:
            self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            return None
        return self._said.read_text(errors="replace")


@contextlib.contextmanager
def serving(*words: str, silent: str) -> Iterator[Server]:
    """Have a qemu-nbd serve an image to this host's other tools while a block runs. Blocks.

    It is killed at the end, so that nobody waits until it has closed the image, and also where the agent is killed.

    Raises:
        OSError: it is not here, or does not start in time, which `silent` says; `strerror` is a sentence.
    """
    with tempfile.TemporaryDirectory(prefix="vmferry-nbd-") as folder, contextlib.ExitStack() as stack:
        place, said = Path(folder, "socket"), Path(folder, "said")
        for program in ("qemu-nbd", _ENDS_WITH_US[0]):
            if shutil.which(program) is None:
                raise _not_here(program)
        process = subprocess.Popen(
            (*_ENDS_WITH_US, "qemu-nbd", "--persistent", "--shared=0", f"--socket={place}", *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stack.enter_context(said.open("wb")),
            env=_english(),
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        gives_up_at = time.monotonic() + ANSWERS_WITHIN_S
        while not _listens(place) and process.poll() is None:
            if time.monotonic() > gives_up_at:
                raise OSError(0, silent)
            time.sleep(_LOOKS_EVERY_S)
        yield Server(f"nbd+unix:///?socket={place}", process, said)


def _listens(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(place)) == 0


def _english() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _not_here(program: str) -> OSError:
    return OSError(0, f"{program} is not installed here ({_PACKAGES[program]})")
