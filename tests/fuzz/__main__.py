"""`python -m tests.fuzz TARGET... [--seconds N | --runs N]`: fuzz targets, all of them when none is named.

Guided by coverage where atheris is installed, else by chance alone. `--replay TARGET FILE` feeds one file, such as a
finding; `--list` says what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tests.fuzz.plain import run_plain
from tests.fuzz.running import NOT_INSTALLED, ROOT, FuzzFigures, is_installed, run_targets
from tests.fuzz.targets import TARGETS

DEFAULT_S = 60


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
    is_guided = is_installed() and not wanted.plain
    if not is_guided and not wanted.plain:
        print(NOT_INSTALLED, file=sys.stderr)
    found = False
    for name in names:
        figures = _fuzz(name, wanted.folder, wanted.runs, wanted.seconds, wanted.seed, is_guided=is_guided)
        print(_as_json(figures) if wanted.json else _shown(figures), flush=True)
        found = found or bool(figures.findings) or not figures.has_ended
    return 1 if found else 0


def _fuzz(name: str, folder: Path, runs: int, seconds: int, seed: int, *, is_guided: bool) -> FuzzFigures:
    if not runs and not seconds:
        seconds = DEFAULT_S
    if not is_guided:
        return run_plain(TARGETS[name], folder, runs=runs or -1, seconds=seconds, seed=seed)
    (figures,) = run_targets([name], folder, runs=runs or -1, seconds=seconds, seed=seed)
    return figures


def _as_json(figures: FuzzFigures) -> str:
    plain = dataclasses.asdict(figures)
    return json.dumps(plain | {"findings": [str(one) for one in figures.findings], "log": str(figures.log)})


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
    parser.add_argument("--plain", action="store_true", help="by chance, even where atheris is installed")
    parser.add_argument("--json", action="store_true", help="one object a line for each target")
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
