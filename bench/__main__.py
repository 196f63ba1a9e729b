"""`python -m bench`: list the scenarios, run some or all of them, compare two runs.

Law: a scenario is a file `bench/run_NAME.py` with `QUESTION: str` (one sentence) and
`run(smoke: bool) -> dict[str, object]` (figures with units in their names; the answer is a `..._ratio`). With
`smoke` it runs once and tiny, to prove that it still runs; such figures prove nothing else. One that lives through
seeds takes `seeds: int` as well, and one of many rows `rows: Sequence[str]`: those that are wanted, as `ways` are of
what it compares with.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from rich.console import Console
from rich.table import Table

from bench.report import (
    Machine,
    ReportInvalid,
    Run,
    changes,
    figures,
    read_run,
    shown,
    this_commit,
    this_machine,
    write_run,
)

__all__ = ["Scenario", "load", "main", "scenario_names"]

FOLDER: Final = Path(__file__).resolve().parent
# What only some scenarios may be told.
OPTIONS: Final = ("seeds", "rows", "ways")


class RunScenario(Protocol):
    """A scenario's `run`."""

    def __call__(self, smoke: bool, **options: int | Sequence[str]) -> Mapping[str, object]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One question and how it is answered."""

    name: str
    question: str
    run: RunScenario

    def takes(self, option: str) -> bool:
        """Whether it may be told this."""
        return option in inspect.signature(self.run).parameters


def scenario_names(folder: Path = FOLDER) -> list[str]:
    """Give the names of all scenarios, sorted."""
    found = (re.fullmatch(r"run_([a-z0-9_]+)\.py", path.name) for path in folder.iterdir())
    return sorted(match[1] for match in found if match)


def load(name: str) -> Scenario:
    """Import one scenario. Its name is one of `scenario_names`."""
    module = importlib.import_module(f"bench.run_{name}")
    return Scenario(name=name, question=module.QUESTION, run=module.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Give 0 when everything that was asked ran, 1 when a scenario failed, 2 for wrong usage."""
    options = _parser().parse_args(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    match options.words:
        case ["list"]:
            for name in scenario_names():
                console.print(f"{name:<12} {load(name).question}")
            return 0
        case ["compare", before, after]:
            return _compare(Path(before), Path(after), console)
        case []:
            if not options.smoke:
                _parser().print_help()
                return 2
            wanted = scenario_names()
        case _:
            wanted = options.words
    unknown = sorted(set(wanted) - set(scenario_names()))
    if unknown or not wanted:
        listed = ", ".join(scenario_names()) or "none"
        console.print(f"error: no scenario {', '.join(unknown) or 'at all'}; there is: {listed}")
        return 2
    more = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    for option in more:
        if deaf := [name for name in wanted if not load(name).takes(option)]:
            console.print(f"error: no {option} in {', '.join(deaf)}: leave --{option} away")
            return 2
    return _run(wanted, options.smoke, more, options.json, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Answer questions of speed with figures that name their machine.",
        epilog="Examples: python -m bench list; python -m bench link --json a.json; "
        "python -m bench chaos --seeds 5000; python -m bench qemu --rows loopback_wr10; "
        "python -m bench compare a.json b.json; python -m bench --smoke",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="list | NAME... | compare A.json B.json")
    parser.add_argument("--smoke", action="store_true", help="once and tiny: only to see that it runs")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds, where there are any (chaos)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these, where there are many (qemu)")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="only these of the other side (qemu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


def _run(
    wanted: Sequence[str],
    smoke: bool,
    more: Mapping[str, int | Sequence[str]],
    json_path: Path | None,
    console: Console,
) -> int:
    machine = this_machine()
    console.print(_sentence(machine))
    results: dict[str, Mapping[str, object]] = {}
    failed = []
    for name in wanted:
        try:
            scenario = load(name)
            console.print(f"\n{scenario.name}: {scenario.question}")
            results[name] = scenario.run(smoke, **more)
        except Exception:
            # A scenario's edge: the others still run, and the exit code tells.
            failed.append(name)
            traceback.print_exc()
            continue
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column()
        table.add_column(justify="right")
        for figure, value in figures(results[name]):
            table.add_row(figure, shown(figure, value))
        console.print(table)
    if smoke:
        console.print("\nThese are figures of a smoke run: they prove that it runs, and nothing else.")
    if failed:
        console.print(f"\nerror: failed: {', '.join(failed)}")
    if json_path is not None:
        write_run(json_path, Run(machine=machine, commit=this_commit(), is_smoke=smoke, results=results))
    return 1 if failed else 0


def _compare(before_path: Path, after_path: Path, console: Console) -> int:
    try:
        before, after = read_run(before_path), read_run(after_path)
    except ReportInvalid as exc:
        console.print(f"error: {exc}")
        return 2
    for word, run in (("before", before), ("after", after)):
        smoke = ", a smoke run" if run.is_smoke else ""
        console.print(f"{word}: {_sentence(run.machine)}, commit {run.commit or 'unknown'}{smoke}")
    if before.machine != after.machine:
        console.print("The machines differ: only the ratios can be compared.")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("figure")
    for heading in ("before", "after", "factor"):
        table.add_column(heading, justify="right")
    for change in changes(before, after):
        factor = "" if change.factor is None else f"{change.factor:.3f}"
        table.add_row(
            f"{change.scenario}.{change.figure}",
            shown(change.figure, change.before),
            shown(change.figure, change.after),
            factor,
        )
    console.print(table)
    return 0


def _sentence(machine: Machine) -> str:
    memory_gib = machine.memory_bytes / (1 << 30)
    return f"{machine.cpu}, {machine.cores} cores, {memory_gib:.1f} GiB, {machine.kernel}, {machine.python}"


if __name__ == "__main__":
    sys.exit(main())
