"""Networks of three hosts that can be parted: each in a namespace of its own, and whoever asks them outside of all.

Law: everything that is made is taken away again. Needs root and iproute2.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

from tests.networks import ip, make_switch, need_networks, plug, tear_down

__all__ = ["Networks", "networks_of"]

SWITCH = "vmf-parted"
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
            ip("-n", _space(one), "route", "replace", "blackhole", f"{self.addresses[other]}/32")

    def heal(self) -> None:
        """Join them again."""
        for number, other in product(range(len(self.addresses)), repeat=2):
            words = ("ip", "-n", _space(number), "route", "del", "blackhole", f"{self.addresses[other]}/32")
            subprocess.run(words, capture_output=True, check=False)


@contextmanager
def networks_of(count: int) -> Iterator[Networks]:
    """Make them for as long as the block lasts."""
    need_networks()
    made = Networks(tuple(f"{SUBNET}.{number + 1}" for number in range(count)))
    spaces, cables = (
        [_space(number) for number in range(count)],
        [f"{SWITCH}{number}" for number in range(count)],
    )
    tear_down(spaces, (*cables, SWITCH))
    try:
        make_switch(SWITCH, f"{SUBNET}.254/24")
        for space, cable, address in zip(spaces, cables, made.addresses, strict=True):
            plug(space, cable, switch=SWITCH, address=f"{address}/24")
        yield made
    finally:
        tear_down(spaces, (*cables, SWITCH))


def _space(number: int) -> str:
    return f"{SWITCH}-{number}"
