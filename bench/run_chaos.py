"""Does any seed of simulated hosts, guests, crashing agents and faults lose a guest or make two of it?

Hours of virtual time with the engine's own procedures, and the agents' journals and recovery (`tests/sim`). A crash is
survived when every guest of its seed runs once at the end, with its RAM; `crashes_at_steps` are those just before or
after something durable or seen by others, `taken_up` the migrations that a restart found in its journals, `gone_on` the
moves that it went on with. A seed that fails is replayed with
`python -m tests.sim --seed N --seeds 1 --story`. `--seeds N` lives through more of them, from 0 on.
"""

from __future__ import annotations

import time
from typing import Final

from tests.sim.faults import Outcome, TheoremBroken
from tests.sim.runner import run_seed

QUESTION: Final = (
    "Does any seed of simulated hosts, crashing agents and faults lose a guest or make two of it?"
)

SEEDS: Final = 300
SMOKE_SEEDS: Final = 3


def run(smoke: bool, seeds: int = SEEDS) -> dict[str, object]:
    """Give what was lived through, and the seeds that failed."""
    outcomes: list[Outcome] = []
    failed: list[str] = []
    started_s = time.monotonic()
    for seed in range(SMOKE_SEEDS if smoke else seeds):
        try:
            outcomes.append(run_seed(seed))
        except TheoremBroken:
            failed.append(str(seed))
    return {
        "seeds": len(outcomes) + len(failed),
        "migrations": sum(outcome.moves for outcome in outcomes),
        "complete": sum(outcome.complete for outcome in outcomes),
        "rolled_back": sum(outcome.rolled_back for outcome in outcomes),
        "in_doubt": sum(outcome.in_doubt for outcome in outcomes),
        "crashes_survived": sum(outcome.crashes for outcome in outcomes),
        "crashes_at_steps": sum(outcome.crashes_at_steps for outcome in outcomes),
        "stops": sum(outcome.stops for outcome in outcomes),
        "taken_up": sum(outcome.taken_up for outcome in outcomes),
        "gone_on": sum(outcome.gone_on for outcome in outcomes),
        "outages": sum(outcome.outages for outcome in outcomes),
        "virtual_h": sum(outcome.virtual_s for outcome in outcomes) / 3600,
        "real_s": time.monotonic() - started_s,
        "seeds_that_lost_or_doubled_a_guest": len(failed),
        "failed_seeds": ", ".join(failed) or "none",
    }
