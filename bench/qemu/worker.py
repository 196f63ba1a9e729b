"""`python -m bench.qemu.worker ORDER.json`: all ways over one link, in turns; prints one JSON line for each move.

Law: run inside the first host's network. Ways alternate, and each round begins at another one: this machine's
neighbours change. A way of which most moves can no longer end in time has no more turns.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import sys
from collections import Counter
from pathlib import Path

from agents.hypervisors.qemu.spec import Accel
from bench.qemu import direct, native
from bench.qemu.links import LINKS
from bench.qemu.source import Place, Source

__all__ = ["main"]

VMFERRY = "vmferry"
# For the destination's QEMU, and for what both ends have beside it.
WARM_BYTES_PER_RAM = 2


def main(order_path: Path) -> None:
    """Do what is ordered."""
    order = json.loads(order_path.read_text())
    link = LINKS[order["link"]]
    place = Place(folder=Path(order["folder"]), binary=Path(order["binary"]), accel=Accel(order["accel"]))
    ways = {way.name: way for way in native.WAYS}
    names = [VMFERRY, *(name for name in order["ways"])]
    failed: Counter[str] = Counter()
    offset: int | None = None
    with direct.running_agents(place, link) as agents:
        for number in range(order["rounds"]):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                if 2 * failed[name] >= order["rounds"]:
                    continue
                source = Source.start(
                    place,
                    link.prefixes[0],
                    ram_bytes=order["ram_bytes"],
                    words=order["words"],
                    offset=offset,
                )
                offset = source.beats.offset
                _warm(WARM_BYTES_PER_RAM * order["ram_bytes"])
                try:
                    if name == VMFERRY:
                        figures = direct.move(source, link, agents, order["timeout_s"])
                    else:
                        pki = place.folder / "qemu-pki"
                        figures = native.move(source, link, ways[name], pki, order["timeout_s"])
                finally:
                    source.close()
                failed[name] += not figures.has_ended
                print(json.dumps({"way": name, **dataclasses.asdict(figures)}), flush=True)


def _warm(size_bytes: int) -> None:
    """Touch as much memory as a move takes, and free it.

    Where the machine is a virtual one whose host takes free memory back, who touches a page first pays 8 µs for it and
    who comes later 1: half a second for 256 MiB, in one way's move or in another's.
    """
    with mmap.mmap(-1, size_bytes) as memory:
        for at in range(0, size_bytes, mmap.PAGESIZE):
            memory[at] = 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
