"""A process that dies while it has guest RAM: nothing of that is in its core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agents.hypervisors.qemu.cmdline import argv_of
from tests.agents.host.processes import REPOSITORY
from tests.agents.hypervisors.qemu.conftest import PLAIN
from tests.agents.hypervisors.qemu.test_adopt import HOST

SECRET = "0123456789abcdef" * 4

# The secret is put together in the guest's RAM alone, piece by piece: it is in no other memory of the process.
DIES = """
import os, resource, sys
from agents.secrecy import leave_no_core
from memory.layout import Layout
from memory.ram import MappedRam, create_ram_file

resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
layout = Layout.of_sizes([("ram", 1 << 20)])
fd = create_ram_file(layout, "ram")
ram = MappedRam(fd, layout)
for at in range(4):
    os.pwrite(fd, b"0123456789abcdef", 16 * at)
if sys.argv[1] == "quiet":
    leave_no_core()
os.abort()
"""


@pytest.fixture
def _cores_are_files() -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if "/" in pattern or pattern.startswith("|") or not pattern.startswith("core"):
        pytest.skip("this host keeps cores elsewhere")


def die(folder: Path, how: str) -> list[Path]:
    done = subprocess.run(
        [sys.executable, "-c", DIES, how], cwd=folder, env={"PYTHONPATH": str(REPOSITORY)}, check=False
    )
    assert done.returncode < 0
    return list(folder.glob("core*"))


@pytest.mark.usefixtures("_cores_are_files")
def test_an_agent_leaves_no_core(tmp_path: Path) -> None:
    assert die(tmp_path, "quiet") == []


@pytest.mark.usefixtures("_cores_are_files")
def test_a_core_that_somebody_asked_for_has_no_guest_ram(tmp_path: Path) -> None:
    (core,) = die(tmp_path, "loud")
    assert SECRET.encode() not in core.read_bytes()


def test_a_qemu_that_vmferry_starts_keeps_its_ram_out_of_its_core() -> None:
    argv = argv_of(PLAIN, HOST, is_incoming=False)
    assert "dump-guest-core=off" in argv[argv.index("-machine") + 1].split(",")
