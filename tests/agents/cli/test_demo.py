"""Whole demos: real processes, ports, guests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents.cli.main import main
from agents.cli.output import Exit

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let demos make their directories where this test can see what they leave."""
    # Not tmp_path: its name has the test's in it, and a unix socket's path has 107 bytes.
    folder = tmp_path_factory.mktemp("d")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def left_behind(folder: Path) -> list[str]:
    """Give the command lines of processes that have to do with this directory."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in command:
                found.append(command)
    return found


def play(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    assert main(["demo", "--json", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    outcome = json.loads(printed.out)
    assert isinstance(outcome, dict)
    return outcome


@pytest.mark.slow
def test_a_demo_ends_with_the_proof_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], scratch: Path
) -> None:
    outcome = play(capsys, "--ram", "64MiB")
    assert outcome["guest"] == "embedded"
    assert outcome["proof"] == {"ram_equal": True, "guest_went_on": True, "equals_unmoved_run": True}
    assert outcome["ram_bytes"] == 64 << 20
    assert outcome["link_breaks"] == outcome["resent_bytes"] == 0
    assert isinstance(outcome["rounds"], list)
    assert len(outcome["rounds"]) >= 1
    parts = outcome["downtime_parts_ms"]
    assert isinstance(parts, dict)
    assert sum(parts.values()) == pytest.approx(outcome["downtime_ms"])
    assert list(scratch.iterdir()) == []
    assert left_behind(scratch) == []


@pytest.mark.slow
def test_a_link_that_is_cut_three_times_takes_nothing_from_the_proof(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = play(capsys, "--ram", "64MiB", "--break-link", "3", "--event-loop", "trio")
    assert outcome["proof_holds"] is True
    assert outcome["link_cuts"] == 3
    assert isinstance(outcome["link_breaks"], int)
    assert outcome["link_breaks"] >= 3


@pytest.mark.slow
def test_an_offline_move_has_the_same_proof(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = play(capsys, "--ram", "64MiB", "--offline")
    assert outcome["proof_holds"] is True
    assert outcome["rounds"] == []
    assert outcome["is_offline"] is True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_in_the_move_leaves_nothing(scratch: Path, number: signal.Signals) -> None:
    # At this rate the move takes minutes.
    command = [sys.executable, "-m", "agents.cli", "demo", "--ram", "64MiB", "--link-rate", "100kB/s"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stderr is not None
        said = []
        for line in demo.stderr:
            said.append(line)
            if line.startswith("precopy"):
                break
        began_s = time.monotonic()
        demo.send_signal(number)
        rest = demo.stderr.read()
        assert demo.wait(30) == Exit.INTERRUPTED, "".join(said) + rest
        assert time.monotonic() - began_s < 15
        assert demo.stdout is not None
        assert demo.stdout.read() == ""
    assert "interrupted: everything that was started has ended" in rest
    assert list(scratch.iterdir()) == []
    assert left_behind(scratch) == []


@pytest.mark.slow
def test_a_demo_whose_agent_dies_says_so_and_keeps_the_logs(scratch: Path) -> None:
    command = [sys.executable, "-m", "agents.cli", "demo", "--ram", "64MiB", "--link-rate", "100kB/s"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if line.startswith("precopy"):
                break
        (folder,) = scratch.iterdir()
        (pid,) = [
            int(process.name)
            for process in Path("/proc").iterdir()
            if process.name.isdigit() and f"{folder}/host-b.toml" in _command_line(process)
        ]
        os.kill(pid, signal.SIGKILL)
        rest = demo.stderr.read()
        assert demo.wait(30) == Exit.REFUSED, rest
        assert demo.stdout is not None
    assert "the agent of host-b ended with code -9" in rest
    assert f"log: {folder}/host-b.log" in rest
    assert (folder / "host-b.log").stat().st_size > 0
    assert left_behind(scratch) == []


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--ram", "3MiB"], "4MiB to 64GiB"),
        (["--ram", "4194305"], "whole pages"),
        (["--ram", "65GiB"], "4MiB to 64GiB"),
        (["--dirty-rate", "4095B/s"], "4096 bytes/s to 4GiB/s"),
        (["--break-link", "51"], "0<=x<=50"),
        (["--ram", "63MiB", "--break-link", "1"], "at least 64MiB of --ram"),
        (["--ram", "64MiB", "--break-link", "16"], "at least 68MiB of --ram"),
        (["--link-rate", "fast"], "a rate looks like"),
    ],
)
def test_what_cannot_be_played_is_refused_before_anything_is_started(
    options: list[str], word: str, capsys: pytest.CaptureFixture[str], scratch: Path
) -> None:
    assert main(["demo", *options]) == Exit.USAGE
    assert word in capsys.readouterr().err
    assert list(scratch.iterdir()) == []
