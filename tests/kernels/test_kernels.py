"""Direct mode with KVM, under kernels that users have: a guest moves between two agents of a machine with each of them.

The machine's KVM is Linux's own (`tests.machine`); what it sees of the processor is QEMU's, where this host has no KVM.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from agents.testguest.image import KERNEL_VARIABLE, find_kernel
from tests.agents.hypervisors.qemu.conftest import needs_qemu
from tests.linuxkernels import Version, kernel_of, unpacked
from tests.machine import run_in_machine
from tests.needs import NotHere, skipped_where_not_here

pytestmark = [pytest.mark.slow, needs_qemu(), pytest.mark.timeout(420)]

DRIVERS = ("kvm_amd", "kvm_intel")
# Two QEMUs, two agents, and what the demo keeps.
RAM_MIB = 3072
WITHIN_S = 400.0
# The first kernel with a log of userfaultfd's.
UFFD_WP = (6, 7)


def under(kernel: Path, folder: Path, commands: str) -> str:
    """Run commands under that kernel with its KVM; give what they printed."""
    script = f"""
        test -c /dev/kvm || exit 77
        export {KERNEL_VARIABLE}={unpacked(find_kernel())}
        python={sys.executable}
        $python -m compileall -q agents memory migrate transport
        {commands}
    """
    outcome = run_in_machine(script, kernel, folder, drivers=DRIVERS, ram_mib=RAM_MIB, within_s=WITHIN_S)
    if outcome.code == 77:
        raise NotHere("this host's KVM does not nest")
    assert outcome.code == 0, outcome.printed[-3000:]
    return outcome.printed


@pytest.mark.parametrize(
    ("log", "since", "before"),
    [("soft-dirty", (5, 7), UFFD_WP), ("uffd-wp", UFFD_WP, (1000, 0))],
    ids=["soft-dirty", "uffd-wp"],
)
def test_a_guest_of_kvm_moves_with_the_dirty_log_of_its_kernel(
    tmp_path: Path, log: str, since: Version, before: Version
) -> None:
    with skipped_where_not_here():
        printed = under(
            kernel_of(since=since, before=before),
            tmp_path,
            """
            $python -m agents.cli demo --guest qemu --ram 160MiB --dirty-rate 1MiB/s --json > /run/demo 2> /run/steps \\
                || { tail -c 1000 /run/steps; exit 1; }
            $python -c "from agents.demo.qemu import best_accel; print('accel', best_accel())"
            echo demo $(cat /run/demo)
            """,
        )
    (told,) = re.findall(r"^demo (\{.*\})$", printed, re.MULTILINE)
    demo = json.loads(told)
    assert demo["proof_holds"] is True
    assert demo["tracking"] == log
    assert "accel kvm" in printed


def test_the_soft_dirty_log_keeps_its_contract_where_the_kernel_has_it(tmp_path: Path) -> None:
    with skipped_where_not_here():
        printed = under(
            kernel_of(before=UFFD_WP),
            tmp_path,
            "$python -m pytest -q --color=no -p no:cacheprovider tests/memory/test_soft_dirty.py",
        )
    assert "8 passed, 1 skipped" in printed
