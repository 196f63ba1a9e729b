"""What a program that the agent starts inherits, with the capability given as a service manager gives it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from agents.capabilities import CAP_SYS_PTRACE
from tests.agents.host.processes import REPOSITORY

STARTS = """
import subprocess
from agents.capabilities import handed_down, keep_from_children

def child():
    said = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    return next(line.split()[1] for line in said.splitlines() if line.startswith("CapAmb"))

before = child()
keep_from_children()
kept = child()
with handed_down():
    handed = child()
print(before, kept, handed, child())
"""


def starts(*prefix: str) -> list[int]:
    """What children inherit: as given, after `keep_from_children`, inside `handed_down`, and after it."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", STARTS],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    return [int(word, 16) for word in done.stdout.split()]


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can give itself capabilities"
)
def test_only_the_child_that_needs_it_inherits_the_capability() -> None:
    wanted = 1 << CAP_SYS_PTRACE
    given = ("setpriv", "--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace")
    assert starts(*given) == [wanted, 0, wanted, 0]


def test_without_any_capability_everything_is_as_it_was() -> None:
    assert starts()[1:] == [0, 0, 0]
