"""What becomes of a guest when things fail, one after the other, all the way through real moves?

Everything that `tests/reliability` and its neighbours try, and how often a guest was lost, ran twice, or had other RAM
than it should: `lost`, `doubled` and `wrong` are 0 or it is a bug. Some 50 minutes. Every piece of a move is cut; black
holes, which take seconds each, are tried `EVERY` so many pieces of the pre-copy, and at all of the switchover.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import partial
from typing import Final

import anyio

from agents.demo.errors import NoQemu
from agents.demo.qemu import find_qemu
from agents.testguest.image import KernelMissing, find_kernel
from bench import run_chaos
from tests.fuzz import running as fuzzing
from tests.fuzz.targets import TARGETS
from tests.model.handover import Bounds, explore
from tests.reliability.kills import Role, try_kills
from tests.reliability.links import try_black_holes, try_cuts
from tests.reliability.stage import Kind, Tally
from tests.reliability.storage import try_storage_faults

QUESTION: Final = "What becomes of a guest when things fail, all the way through real moves?"

LOOPS: Final = ("asyncio", "trio")
# How far apart the tried pieces of the pre-copy are, and how many of the last are all tried: cuts, black holes.
EVERY: Final = {Kind.EMBEDDED: ((1, 40), (16, 16)), Kind.QEMU: ((1, 40), (64, 16))}
SMOKE_EVERY: Final = 256
SEEDS: Final = 100
FUZZ_S: Final = 5


def run(smoke: bool) -> dict[str, object]:
    """Give what was tried and what came of it, kind by kind."""
    # Agents of this very process are asked to fail some thousand times: what they log about it is not the answer.
    logging.getLogger("agents").addHandler(logging.NullHandler())
    figures = dict(_modelled(smoke))
    kinds = [Kind.EMBEDDED] if smoke or not _has_qemu() else list(Kind)
    for kind in kinds:
        for loop in LOOPS[:1] if smoke else LOOPS:
            figures |= dict(_tried(kind, loop, smoke))
    return figures


def _modelled(smoke: bool) -> Iterator[tuple[str, object]]:
    """What needs no agents: the model, simulated worlds, parsers, and the storage of an in-process move."""
    bounds = Bounds(max_faults=0) if smoke else Bounds(max_faults=1, late_claims=True, may_not_start=True)
    seen = explore(bounds=bounds)
    yield "model_states", seen.states
    yield "model_transitions", seen.transitions
    yield "model_violations", int(seen.violation is not None)
    chaos = run_chaos.run(smoke, seeds=SEEDS)
    for figure in (
        "seeds",
        "migrations",
        "crashes_survived",
        "virtual_h",
        "seeds_that_lost_or_doubled_a_guest",
    ):
        yield f"simulated_{figure}", chaos[figure]
    if fuzzing.is_installed() and not smoke:
        for target, executions in fuzzing.executions(list(TARGETS), seconds=FUZZ_S).items():
            yield f"fuzz_{target.replace('-', '_')}_executions", executions
    storage, of_note = anyio.run(partial(try_storage_faults, every=SMOKE_EVERY if smoke else 1))
    yield from _shown("storage", storage)
    for name, count in of_note.items():
        yield f"storage_{name}", count


def _tried(kind: Kind, loop: str, smoke: bool) -> Iterator[tuple[str, object]]:
    (cuts_every, cuts_last), (holes_every, holes_last) = (
        ((SMOKE_EVERY, 2), (SMOKE_EVERY, 2)) if smoke else EVERY[kind]
    )
    name = f"{kind}_{loop}"
    for role in Role:
        kills, died_at = anyio.run(partial(try_kills, kind, loop, role, every=8 if smoke else 1))
        yield from _shown(f"kills_of_{role}_{name}", kills)
        yield f"kills_of_{role}_{name}_at", ", ".join(died_at)
    cuts = anyio.run(partial(try_cuts, kind, loop, every=cuts_every, last=cuts_last))
    yield from _shown(f"cuts_{name}", cuts)
    holes = anyio.run(partial(try_black_holes, kind, loop, every=holes_every, last=holes_last))
    yield from _shown(f"black_holes_{name}", holes)


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
