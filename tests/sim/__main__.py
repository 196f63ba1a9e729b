"""`python -m tests.sim --seeds N [--seed K]`: N seeds from K on; the story of each with `--story`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.faults import TheoremBroken
from tests.sim.runner import run_seed


def main() -> int:
    """Give 0 when the theorem held in all seeds."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--story", action="store_true", help="tell what happened")
    wanted = parser.parse_args()
    failed = 0
    started_s = time.monotonic()
    virtual_s = 0.0
    for seed in range(wanted.seed, wanted.seed + wanted.seeds):
        try:
            outcome = run_seed(seed)
        except TheoremBroken as broken:
            failed += 1
            print(f"seed {seed}: {broken}")
            continue
        virtual_s += outcome.virtual_s
        print(
            f"seed {seed}: {outcome.hosts} hosts, {outcome.guests} guests, {outcome.moves} moves, "
            f"{outcome.complete} complete, {outcome.rolled_back} rolled back, {outcome.in_doubt} in doubt, "
            f"{outcome.crashes} crashes survived, {outcome.stops} stops, {outcome.outages} outages, "
            f"{outcome.virtual_s:.0f} s"
        )
        if wanted.story:
            print(*outcome.story, sep="\n")
    print(f"{wanted.seeds} seeds, {failed} failed; {virtual_s:.0f} s in {time.monotonic() - started_s:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
