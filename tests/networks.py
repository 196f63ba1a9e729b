"""Network namespaces and the cables to them, made with iproute2 by root and taken away again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

import pytest

__all__ = ["PLUG", "ip", "make_switch", "need_networks", "plug", "tear_down"]

# The end of a cable that is inside of a namespace.
PLUG: Final = "up0"


def need_networks(*programs: str) -> None:
    """Skip where no networks can be made, or one of these programs is not there."""
    if os.geteuid() != 0 or any(shutil.which(program) is None for program in ("ip", *programs)):
        pytest.skip(f"needs root, {', '.join(('iproute2', *programs))} for network namespaces")


def ip(*words: str) -> None:
    """Have iproute2 do something. Raises OSError with its words."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def make_switch(switch: str, address: str) -> None:
    """Make a bridge that this host is plugged into, at an address with its prefix's length."""
    ip("link", "add", switch, "type", "bridge")
    ip("addr", "add", address, "dev", switch)
    ip("link", "set", switch, "up")


def plug(space: str, cable: str, *, switch: str = "", address: str = "") -> None:
    """Make a namespace whose PLUG, at an address, is the other end of a cable; this end is in a switch or by itself."""
    ip("netns", "add", space)
    ip("link", "add", cable, "type", "veth", "peer", "name", PLUG, "netns", space)
    ip("link", "set", cable, *(("master", switch) if switch else ()), "up")
    if address:
        ip("-n", space, "addr", "add", address, "dev", PLUG)
    for device in ("lo", PLUG):
        ip("-n", space, "link", "set", device, "up")


def tear_down(spaces: Sequence[str], links: Sequence[str]) -> None:
    """Take away what is there of these, in their order."""
    # The cables first: a namespace that is deleted lets go of its own only some time later.
    for words in (*(("link", "del", link) for link in links), *(("netns", "del", space) for space in spaces)):
        subprocess.run(["ip", *words], capture_output=True, check=False)
