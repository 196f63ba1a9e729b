"""Two hosts on one machine: loopback, or two network namespaces with a cable of a given rate between them.

Law: everything that is made is taken away again. Needs root and iproute2 for all but loopback.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["LINKS", "Link", "can_make_links", "cable"]

SPACES: Final = ("vmf-bench-a", "vmf-bench-b")
ADDRESSES: Final = ("10.78.0.1", "10.78.0.2")
# What a switch's port keeps at most; with less, TCP does not fill the link.
BUFFER: Final = {"1gbit": "512kb", "100mbit": "256kb"}
# More than one packet of 64 KiB that the kernel leaves to the network card to cut. A smaller bucket has it cut here,
# and nothing joins the pieces again: CPU that no host with a card pays (bench/README.md).
BUCKET: Final = "128kb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """`prefixes` begin the commands of either host; `device` is the interface whose counters count."""

    name: str
    addresses: tuple[str, str]
    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    device: str

    def wire_bytes(self) -> int:
        """Bytes that went over the link so far, both ways; read inside the first host's network."""
        counters = Path(f"/sys/class/net/{self.device}/statistics")
        received = int((counters / "rx_bytes").read_text())
        # On loopback everything that is sent is received.
        return received if self.device == "lo" else received + int((counters / "tx_bytes").read_text())


LINKS: Final = {
    "loopback": Link(name="loopback", addresses=("127.0.0.1", "127.0.0.1"), prefixes=((), ()), device="lo"),
    **{
        rate: Link(
            name=rate,
            addresses=ADDRESSES,
            prefixes=(("ip", "netns", "exec", SPACES[0]), ("ip", "netns", "exec", SPACES[1])),
            device="cable",
        )
        for rate in ("1gbit", "100mbit")
    },
}


def can_make_links() -> bool:
    """Tell whether this user may make network namespaces here."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("tc") is not None


@contextlib.contextmanager
def cable(link: Link) -> Iterator[None]:
    """Have the link for as long as the block lasts."""
    if link.name == "loopback":
        yield
        return
    _remove()
    try:
        for space in SPACES:
            _run("ip", "netns", "add", space)
        _run(
            *("ip", "link", "add", "cable", "netns", SPACES[0], "type", "veth"),
            *("peer", "name", "cable", "netns", SPACES[1]),
        )
        for space, address in zip(SPACES, ADDRESSES, strict=True):
            _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _run("ip", "-n", space, "link", "set", device, "up")
            limit = ("rate", link.name, "burst", BUCKET, "limit", BUFFER[link.name])
            _run("tc", "-n", space, "qdisc", "add", "dev", "cable", "root", "tbf", *limit)
        yield
    finally:
        _remove()


def _remove() -> None:
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _run(*words: str) -> None:
    subprocess.run(words, check=True)
