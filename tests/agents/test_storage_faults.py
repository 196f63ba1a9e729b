"""A sample of what `tests.reliability.storage` tries in full: storage that fails in the middle of moves."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

import anyio
import pytest

from migrate.phases import Phase
from tests.agents.host.fleet import report_of, running_fleet, scratch_folder
from tests.reliability.storage import Fault, FaultyOs, try_storage_faults

# Prime to the number of operations and of ways to fail, so that a sample has some of each.
SAMPLE = 47


def check(every: int, *, at_least: int) -> None:
    tally, of_note = anyio.run(partial(try_storage_faults, every=every))
    assert (tally.lost, tally.doubled, tally.wrong) == (0, 0, 0), tally
    assert (of_note["misowned"], of_note["litter"]) == (0, 0)
    assert of_note["in_doubt"] > 0
    assert tally.moved > 0
    assert tally.stayed > 0
    assert tally.tried >= at_least


def test_no_failing_operation_of_the_storage_makes_two_guests_or_none() -> None:
    check(SAMPLE, at_least=40)


@pytest.mark.slow
def test_every_other_operation_of_the_storage_may_fail_in_every_way() -> None:
    check(2, at_least=1000)  # `python -m bench faults` tries them all


class OneLinkOfARecord(FaultyOs):
    """The fault is in the link that gives generation 2 its name."""

    def __getattr__(self, name: str) -> object:
        original = super().__getattr__(name)
        if name != "link":
            return original

        def link(existing: Path, new: Path) -> None:
            self.at = len(self.calls) if new.name.endswith(".000000000002") else -1
            original(existing, new)  # type: ignore[operator]

        return link


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "runs_on"),
    [
        (Fault.FAILS, errno.ENOSPC, "host-a"),
        (Fault.DONE_BUT_FAILS, errno.ENOSPC, "host-b"),
        (Fault.DONE_BUT_FAILS, errno.ETIMEDOUT, "host-b"),
    ],
)
@pytest.mark.anyio
async def test_agents_whose_claim_fails_agree_on_who_runs_the_guest(
    fault: Fault, code: int, runs_on: str
) -> None:
    with scratch_folder() as folder, OneLinkOfARecord(-1, code, fault).in_place():
        async with running_fleet(folder) as fleet:
            guest = fleet.start_guest("host-a").guest_id
            report = report_of(await fleet.move("worker", "host-a", "host-b"))
            assert report.phase is (Phase.COMPLETE if runs_on == "host-b" else Phase.ROLLED_BACK)
            assert report.runs_on == runs_on
            await fleet.check_runs_only_at(runs_on, guest)
