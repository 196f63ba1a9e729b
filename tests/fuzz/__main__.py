"""`python -m tests.fuzz TARGET... [--seconds N | --runs N]`: fuzz targets, all of them when none is named.

`--replay TARGET FILE` feeds one file, such as a finding, and needs no atheris; `--list` says what there is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.running import NOT_INSTALLED, ROOT, FuzzFigures, is_installed, run_targets
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Give 0 when no target found anything, 1 when one did, 2 for wrong usage."""
    wanted = _parser().parse_args()
    if wanted.list:
        for target in TARGETS.values():
            print(f"{target.name:<24} {target.law}")
        return 0
    if wanted.replay:
        name, file = wanted.replay
        return _unknown([name]) or _replay(name, Path(file))
    names = wanted.targets or list(TARGETS)
    if status := _unknown(names):
        return status
    if not is_installed():
        print(NOT_INSTALLED)
        return 2
    found = False
    for name in names:
        (figures,) = run_targets(
            [name], wanted.folder, runs=wanted.runs or -1, seconds=wanted.seconds, seed=wanted.seed
        )
        print(_shown(figures), flush=True)
        found = found or bool(figures.findings) or not figures.has_ended
    return 1 if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--seconds", type=int, default=0, help="for each target; 60 when neither is given")
    how_long.add_argument("--runs", type=int, default=0, help="executions of each target")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0 is another one each time")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".fuzz", help="where corpora and findings are kept"
    )
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="feed one input")
    parser.add_argument("--list", action="store_true", help="name the targets and their laws")
    return parser


def _unknown(names: list[str]) -> int:
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        print(f"no target {', '.join(unknown)}; there are: {', '.join(TARGETS)}")
    return 2 if unknown else 0


def _replay(name: str, file: Path) -> int:
    """Feed one file; what it breaks comes with its traceback."""
    data = file.read_bytes()
    TARGETS[name].check(data)
    print(f"{name}: the law holds for {file} ({len(data)} bytes)")
    return 0


def _shown(figures: FuzzFigures) -> str:
    words = (
        f"{figures.name:<24} {figures.executions:>9} executions  {figures.executions_per_s:>6}/s  "
        f"{figures.edges:>5} edges"
    )
    if not figures.has_ended and not figures.findings:
        words += f"  the process died: see {figures.log}"
    for finding in figures.findings:
        words += f"\n  FINDING: python -m tests.fuzz --replay {figures.name} {finding}  (log: {figures.log})"
    return words


if __name__ == "__main__":
    sys.exit(main())
