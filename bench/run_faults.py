"""What becomes of a guest when things fail, one after the other, all the way through real moves?

Everything that `tests/reliability` and its neighbours try, and how often a guest was lost, ran twice, or had other RAM
than it should: `lost`, `doubled` and `wrong` are 0 or it is a bug. It takes its time: of QEMU guests, which have more
than a thousand pieces alike, the pre-copy is cut at every sixteenth piece only, and the switchover at each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import anyio

from agents.demo.errors import NoQemu
from agents.demo.qemu import find_qemu
from agents.testguest.image import KernelMissing, find_kernel
from tests.reliability.kills import Role, try_kills
from tests.reliability.links import LAST_PIECES, try_black_holes, try_cuts
from tests.reliability.stage import Kind, Tally
from tests.reliability.storage import try_storage_faults

QUESTION = "What becomes of a guest when things fail, all the way through real moves?"

LOOPS = ("asyncio", "trio")
# How far apart the tried pieces of the pre-copy are: (cuts, black holes).
EVERY = {Kind.EMBEDDED: (1, 16), Kind.QEMU: (16, 256)}
SMOKE_EVERY = 256


def run(smoke: bool) -> dict[str, object]:
    """Give what was tried and what came of it, kind by kind."""
    figures: dict[str, object] = {}
    kinds = [Kind.EMBEDDED] if smoke or not _has_qemu() else list(Kind)
    for kind in kinds:
        for loop in LOOPS[:1] if smoke else LOOPS:
            figures |= dict(_tried(kind, loop, smoke))
    storage, of_note = anyio.run(partial(try_storage_faults, every=SMOKE_EVERY if smoke else 1))
    figures |= dict(_shown("storage", storage))
    return figures | {f"storage_{name}": count for name, count in of_note.items()}


def _tried(kind: Kind, loop: str, smoke: bool) -> Iterator[tuple[str, object]]:
    cuts_every, holes_every = (SMOKE_EVERY, SMOKE_EVERY) if smoke else EVERY[kind]
    last = 2 if smoke else LAST_PIECES
    name = f"{kind}_{loop}"
    cuts = anyio.run(partial(try_cuts, kind, loop, every=cuts_every, last=last))
    yield from _shown(f"cuts_{name}", cuts)
    holes = anyio.run(partial(try_black_holes, kind, loop, every=holes_every, last=last))
    yield from _shown(f"black_holes_{name}", holes)
    for role in Role:
        kills, died_at = anyio.run(partial(try_kills, kind, loop, role, every=8 if smoke else 1))
        yield from _shown(f"kills_of_{role}_{name}", kills)
        yield f"kills_of_{role}_{name}_at", ", ".join(died_at)


def _shown(name: str, tally: Tally) -> Iterator[tuple[str, object]]:
    print(f"{name}: {tally}", file=sys.stderr, flush=True)
    yield from tally.figures(name).items()


def _has_qemu() -> bool:
    try:
        find_qemu()
        find_kernel()
    except (NoQemu, KernelMissing):
        return False
    return True
