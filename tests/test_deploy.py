"""The service's unit is one that systemd takes, and forbids nothing that moving a guest needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1] / "deploy/systemd/vmferry-agent.service"
# What `docs/qemu.md` says of the way to a guest's RAM.
SYSTEM_CALLS = (
    "ptrace",
    "pidfd_open",
    "pidfd_getfd",
    "pidfd_send_signal",
    "process_vm_readv",
    "process_vm_writev",
    "userfaultfd",
    "memfd_create",
    "ioctl",
    "prctl",
    "setrlimit",
)
MOST_EXPOSURE = 3.0

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian: systemd)"
)


def analyze(*words: str) -> str:
    done = subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def allowed_calls() -> set[str]:
    """The system calls of the unit's filter, sets of sets spelled out."""
    (line,) = (line for line in UNIT.read_text().splitlines() if line.startswith("SystemCallFilter="))
    wanted, found = line.partition("=")[2].split(), set()
    while wanted:
        name = wanted.pop()
        if name.startswith("@"):
            lines = analyze("syscall-filter", name).splitlines()[1:]
            wanted += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        else:
            found.add(name)
    return found


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/vmferry", "/bin/true"))
    assert analyze("verify", str(unit)).strip() == ""


def test_the_filter_allows_what_the_way_to_a_guests_ram_needs() -> None:
    assert set(SYSTEM_CALLS) - allowed_calls() == set()


def test_the_sandbox_is_as_tight_as_the_docs_say() -> None:
    said = re.search(r"exposure level for \S+: ([0-9.]+)", analyze("security", "--offline=true", str(UNIT)))
    assert said is not None
    assert float(said[1]) <= MOST_EXPOSURE
