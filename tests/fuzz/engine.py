"""The process that has atheris in it: `python -m tests.fuzz.engine FOLDER NAME...`, started by `running`.

Law: the product is imported once, with its bytecode instrumented; each target then lives in a fork of its own, so that
a crash, a hang or a finding ends that target alone. Everything that a person needs afterwards is in FOLDER/NAME: `log`,
`findings`, `corpus`.

Processes: one fork at a time, waited for. No thread may be started before the forks.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

import atheris

# atheris can also look into patterns and startswith; its stand-in for a pattern lacks half of re, json among its users.
with atheris.instrument_imports(include=["agents", "memory", "migrate", "transport"]):
    from tests.fuzz.targets import TARGETS

__all__ = ["main"]

# One input that takes longer than this hangs; the targets' own limits of CPU time are far below.
_HANG_S: Final = 60
_RSS_LIMIT_MIB: Final = 2048


def main() -> int:
    """Fuzz each target for some runs, or for some seconds."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.engine", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    limits = [f"-runs={wanted.runs}", f"-max_total_time={wanted.seconds}", f"-seed={wanted.seed}"]
    for name in wanted.names:
        folder = wanted.folder / name
        child = os.fork()
        if child == 0:
            try:
                _fuzz(name, folder, limits)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(f"{name}: {os.waitstatus_to_exitcode(status)}", flush=True)
    return 0


def _fuzz(name: str, folder: Path, limits: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    target = TARGETS[name]
    for part in ("corpus", "findings", "seeds"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / "seeds" / f"{number:03}").write_bytes(seed)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    arguments = [
        *limits,
        f"-max_len={target.most_input_bytes}",
        f"-timeout={_HANG_S}",
        f"-rss_limit_mb={_RSS_LIMIT_MIB}",
        f"-artifact_prefix={folder / 'findings'}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([name, *arguments, str(folder / "corpus"), str(folder / "seeds")], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
