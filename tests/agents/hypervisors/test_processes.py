"""Programs that are run until they have put their guest into the background."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from agents.hypervisors.processes import run_to_end

HERE = Path("/")


def test_its_code_and_its_words_are_given() -> None:
    with tempfile.TemporaryFile() as words:
        code = run_to_end(["sh", "-c", "echo said; exit 3"], cwd=HERE, timeout_s=10, output=words)
        words.seek(0)
        assert (code, words.read()) == (3, b"said\n")


def test_its_end_is_seen_when_it_comes() -> None:
    def run() -> float:
        began_s = time.monotonic()
        run_to_end(["sleep", "0.07"], cwd=HERE, timeout_s=10)
        return time.monotonic() - began_s

    # A wait that looks now and then sees it after 113 ms.
    assert min(run() for _ in range(8)) < 0.1


def test_one_that_does_not_end_is_killed() -> None:
    began_s = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_to_end(["sleep", "60"], cwd=HERE, timeout_s=0.1)
    assert time.monotonic() - began_s < 30


def test_one_that_is_to_be_ended_early_is_killed() -> None:
    abort = os.eventfd(0)
    try:
        os.eventfd_write(abort, 1)
        began_s = time.monotonic()
        assert run_to_end(["sleep", "60"], cwd=HERE, timeout_s=60, abort=abort) == -signal.SIGKILL
        assert time.monotonic() - began_s < 30
    finally:
        os.close(abort)


def test_one_that_is_not_there_is_said() -> None:
    with pytest.raises(FileNotFoundError):
        run_to_end(["/no/such/program"], cwd=HERE, timeout_s=1)
