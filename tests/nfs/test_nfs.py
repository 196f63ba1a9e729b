"""Ownership records on real NFS: Linux's server and client, in a machine of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents.hypervisors.qemu.conftest import needs_qemu
from tests.needs import skipped_where_not_here
from tests.nfs.inside import RACES, Fault
from tests.nfs.machine import results_of

pytestmark = [pytest.mark.slow, needs_qemu(), pytest.mark.timeout(600)]

# Some 100 s.
EVERY = 7


def test_a_server_that_fails_at_operations_of_a_claim_makes_one_owner(tmp_path: Path) -> None:
    """`python -m tests.nfs` tries every operation."""
    with skipped_where_not_here():
        race, *faults = results_of(tmp_path, every=EVERY, timeout_s=500)
    assert race["wrong"] == []
    assert race["tried"] == RACES
    assert [one["fault"] for one in faults] == list(Fault)
    for one in faults:
        assert one["wrong"] == []
        assert int(str(one["tried"])) >= 5
    errors = {str(one["fault"]): one["errors"] for one in faults}
    # The faults were felt.
    assert errors[Fault.DOWN] != []
    assert errors[Fault.REPLACED] != []
