"""What a bench run says: figures with the machine they were taken on, and two runs side by side.

Law: a figure is a number whose name carries its unit; a name that ends in `_ratio` is the answer of its scenario and
the only thing that may be compared between machines.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "Change",
    "Machine",
    "ReportInvalid",
    "Run",
    "changes",
    "figures",
    "read_run",
    "shown",
    "this_commit",
    "this_machine",
    "write_run",
]

REPOSITORY: Final = Path(__file__).resolve().parent.parent


class ReportInvalid(Exception):
    """A file that is not the JSON of a bench run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where figures were taken: none of them means anything without it."""

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Some scenarios, run once each. `commit` is empty outside a checkout; `is_smoke` figures prove nothing."""

    machine: Machine
    commit: str
    is_smoke: bool
    results: Mapping[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure in two runs."""

    scenario: str
    figure: str
    before: float
    after: float

    @property
    def factor(self) -> float | None:
        """After over before; None where before is zero."""
        return self.after / self.before if self.before else None


def this_machine() -> Machine:
    """Name the machine this runs on; the cores are those that this process may use."""
    return Machine(
        cpu=_cpu_model(Path("/proc/cpuinfo")),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
    )


def this_commit() -> str:
    """Give the checkout's commit, with `-dirty` for one with changes; empty when there is none to ask."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def figures(result: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Give the numbers of one scenario's result, those of inner objects by dotted names."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def shown(figure: str, value: float) -> str:
    """Write one figure for reading: four figures, a ratio with its sign."""
    if figure.endswith("_ratio"):
        return f"{value:.3g}x"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_run(path: Path, run: Run) -> None:
    """Write a run as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(run), indent=2, default=str) + "\n", encoding="utf-8")


def read_run(path: Path) -> Run:
    """Read what `write_run` wrote.

    Raises:
        ReportInvalid: it is something else.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
        return Run(
            machine=Machine(**parsed["machine"]),
            commit=str(parsed["commit"]),
            is_smoke=bool(parsed["is_smoke"]),
            results={str(name): dict(result) for name, result in parsed["results"].items()},
        )
    except OSError as exc:
        raise ReportInvalid(f"{path}: {exc.strerror}") from exc
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise ReportInvalid(f"{path} was not written by `python -m bench --json`") from exc


def changes(before: Run, after: Run) -> list[Change]:
    """Give every figure that both runs have, in the order of `before`."""
    both = []
    for scenario, result in before.results.items():
        after_figures = dict(figures(after.results.get(scenario, {})))
        for figure, value in figures(result):
            if figure in after_figures:
                both.append(
                    Change(scenario=scenario, figure=figure, before=value, after=after_figures[figure])
                )
    return both


def _cpu_model(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()
