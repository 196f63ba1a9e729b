"""Runs targets under atheris, in a process of their own, and reads what came out.

Law: does not import atheris and needs no target to be importable here: figures come from the child's log.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["NOT_INSTALLED", "FuzzFigures", "executions", "is_installed", "run_targets"]

ROOT: Final = Path(__file__).parents[2]
NOT_INSTALLED: Final = (
    "atheris is not installed, so nothing guides the mutations: pip install -e .[fuzz] (CPython 3.11 to 3.13)"
)
_EXECUTED: Final = re.compile(r"^stat::number_of_executed_units:\s*(\d+)", re.MULTILINE)
_PER_S: Final = re.compile(r"^stat::average_exec_per_sec:\s*(\d+)", re.MULTILINE)
_PROGRESS: Final = re.compile(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FuzzFigures:
    """What one target's run came to.

    `edges` are those of the product's bytecode that its inputs reached; `findings` are inputs that broke its law.
    `has_ended` is False where the child died without a word: a crash of the interpreter or of native code.
    """

    name: str
    executions: int
    executions_per_s: int
    edges: int
    findings: tuple[Path, ...]
    log: Path
    has_ended: bool


def is_installed() -> bool:
    """Whether there is an atheris to run."""
    return importlib.util.find_spec("atheris") is not None


def run_targets(
    names: Sequence[str], folder: Path, *, runs: int = -1, seconds: int = 0, seed: int = 0
) -> list[FuzzFigures]:
    """Fuzz targets one after the other, each for `runs` executions, or for `seconds` when that is not 0.

    What they find and learn stays in `folder`, and the next run begins with it.
    """
    command = [sys.executable, "-m", "tests.fuzz.engine", str(folder.absolute()), *names]
    command += [f"--runs={runs}", f"--seconds={seconds}", f"--seed={seed}"]
    folder.mkdir(parents=True, exist_ok=True)
    # What is instrumented is said on stderr, some fifty lines.
    with (folder / "engine.log").open("wb") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    return [_read(name, folder / name) for name in names]


def executions(names: Sequence[str], *, runs: int = -1, seconds: int = 0) -> dict[str, int]:
    """Give how many inputs each target took without a finding; 0 where there was one."""
    with tempfile.TemporaryDirectory(prefix="vmferry-fuzz-") as folder:
        figures = run_targets(names, Path(folder), runs=runs, seconds=seconds)
        return {one.name: 0 if one.findings or not one.has_ended else one.executions for one in figures}


def _read(name: str, folder: Path) -> FuzzFigures:
    words = (folder / "log").read_text(errors="replace")
    last = [(int(count), int(edges)) for count, edges, _ in _PROGRESS.findall(words)][-1:] or [(0, 0)]
    executed, per_s = _EXECUTED.search(words), _PER_S.search(words)
    return FuzzFigures(
        name=name,
        executions=int(executed[1]) if executed else last[0][0],
        executions_per_s=int(per_s[1]) if per_s else 0,
        edges=last[0][1],
        findings=tuple(sorted((folder / "findings").iterdir())),
        log=folder / "log",
        has_ended=executed is not None,
    )
