"""Networks of three hosts that can be parted: each in a namespace of its own, and whoever asks them outside of all.

Law: everything that is made is taken away again. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pytest

__all__ = ["Networks", "networks_of"]

BRIDGE = "vmf-parted"
SUBNET = "10.79.0"


@dataclass(frozen=True, slots=True)
class Networks:
    """The addresses of the hosts. Both ends of a parting drop what is for the other, and nobody is told."""

    addresses: tuple[str, ...]

    def prefix(self, number: int) -> list[str]:
        """What a command begins with that runs on a host."""
        return ["ip", "netns", "exec", _space(number)]

    def part(self, some: Sequence[int]) -> None:
        """Cut some hosts off from all the others; they reach each other, and those who ask reach everybody."""
        others = [number for number in range(len(self.addresses)) if number not in some]
        for one, other in (*product(some, others), *product(others, some)):
            _run("ip", "-n", _space(one), "route", "replace", "blackhole", f"{self.addresses[other]}/32")

    def heal(self) -> None:
        """Join them again."""
        for number, other in product(range(len(self.addresses)), repeat=2):
            words = ("ip", "-n", _space(number), "route", "del", "blackhole", f"{self.addresses[other]}/32")
            subprocess.run(words, capture_output=True, check=False)


@contextmanager
def networks_of(count: int) -> Iterator[Networks]:
    """Make them for as long as the block lasts."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    made = Networks(tuple(f"{SUBNET}.{number + 1}" for number in range(count)))
    _remove(count)
    try:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for number, address in enumerate(made.addresses):
            space, cable = _space(number), f"{BRIDGE}{number}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", cable, "master", BRIDGE, "up")
            _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", device, "up")
        yield made
    finally:
        _remove(count)


def _space(number: int) -> str:
    return f"{BRIDGE}-{number}"


def _remove(count: int) -> None:
    for number in range(count):
        subprocess.run(["ip", "netns", "del", _space(number)], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def _run(*words: str) -> None:
    subprocess.run(words, check=True)
