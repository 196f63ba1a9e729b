"""Predictions of real moves between two real agents: made beforehand, kept beside the outcome, in nobody's way."""

from __future__ import annotations

import anyio
import pytest

from agents.api import (
    Check,
    CheckReport,
    Done,
    ListPredictions,
    PredictionList,
    Refused,
    SetLimits,
)
from agents.hypervisors.embedded.client import GuestClient
from agents.hypervisors.embedded.rundir import GuestPaths
from agents.hypervisors.embedded.spec import EmbeddedSpec, Pattern
from agents.predictions import PredictionFile
from migrate.forecast import Basis, PastMove
from migrate.phases import Phase
from tests.agents.host.fleet import NOISE, SLOW, Fleet, in_precopy, running_fleet, scratch_folder
from tests.agents.host.qemu_guests import vm_flags
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def check(fleet: Fleet, spec: EmbeddedSpec, **wishes: object) -> CheckReport:
    answer = await fleet.ask("host-a", Check(guest=spec.guest_id, to="host-b", **wishes))  # type: ignore[arg-type]
    assert isinstance(answer, CheckReport), answer
    return answer


async def listed(fleet: Fleet, host: str = "host-a", guest: str = "") -> PredictionList:
    answer = await fleet.ask(host, ListPredictions(guest=guest))
    assert isinstance(answer, PredictionList), answer
    return answer


async def ended(fleet: Fleet, moves: int = 1) -> tuple[PastMove, ...]:
    """Wait until so many outcomes are kept: that is after watchers hear of the end."""

    async def kept() -> tuple[PastMove, ...]:
        found = (await listed(fleet)).moves
        return found if sum(one.outcome is not None for one in found) >= moves else ()

    return await until(kept, "the outcome of a move")


def pid_of(fleet: Fleet, spec: EmbeddedSpec) -> int:
    client = GuestClient(GuestPaths.of_guest(fleet.guests_dir("host-a"), spec.guest_id).socket)
    try:
        return client.pid
    finally:
        client.close()


@pytest.mark.slow
async def test_a_move_that_was_checked_leaves_that_prediction_with_its_outcome() -> None:
    with scratch_folder() as folder:
        async with running_fleet(folder) as fleet:
            spec = fleet.start_guest("host-a")
            report = await check(fleet, spec, predict_s=0.5)
            prediction = report.prediction
            assert prediction is not None, report.unpredicted
            assert prediction.basis is Basis.MEASURED
            assert prediction.load is not None
            assert prediction.load.populated_bytes >= 16 << 20
            # 20 MiB/s of a working set of 8 MiB: in the longest window more than in the shortest.
            first, *_, last = prediction.load.windows
            assert 0 < first.pages < last.pages <= (8 << 20) // 4096 + 64
            assert "uw" not in vm_flags(pid_of(fleet, spec))
            view = await fleet.move(spec.guest_id, "host-a", "host-b")
            assert view.phase is Phase.COMPLETE
            (one,) = await ended(fleet)
            assert one.prediction == prediction
            outcome = one.outcome
            assert outcome is not None
            assert view.report is not None
            assert (outcome.job, outcome.total_s) == (view.job, view.report.total_s)
            assert outcome.wire_bytes == view.report.wire_bytes
            assert outcome.cpu_s is not None
            assert outcome.cpu_s > 0
            await fleet.check_runs_only_at("host-b", spec.guest_id)
        # It is there for the agent that is started next.
        table = PredictionFile(fleet.state_dir("host-a") / "predictions.jsonl").read()
        assert table.moves() == [one]


@pytest.mark.slow
async def test_a_move_without_a_check_is_predicted_from_what_earlier_ones_showed() -> None:
    with scratch_folder() as folder:
        async with running_fleet(folder) as fleet:
            spec = fleet.start_guest("host-a", pattern=Pattern.RANDOM)
            for source, to in (("host-a", "host-b"), ("host-b", "host-a"), ("host-a", "host-b")):
                view = await fleet.move(spec.guest_id, source, to)
                assert view.phase is Phase.COMPLETE
            moves = await ended(fleet, 2)
            assert [one.prediction.basis for one in moves] == [Basis.ASSUMED, Basis.REMEMBERED]
            assert [one.prediction.learned_from for one in moves] == [0, 1]
            # Who knows more promises less room.
            first, second = (one.prediction.figures.wire_bytes.width for one in moves)
            assert second < first
            assert len((await listed(fleet, "host-b")).moves) == 1
            assert (await listed(fleet, guest="nobody")).moves == ()
            assert len((await listed(fleet, guest="worker")).moves) == 2


@pytest.mark.slow
async def test_a_guest_that_moves_is_not_probed_and_its_check_says_so() -> None:
    with scratch_folder() as folder:
        async with running_fleet(folder) as fleet:
            spec = fleet.start_guest("host-a", **NOISE)
            job = await fleet.start(spec.guest_id, "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
            await fleet.until("host-a", job, in_precopy)
            report = await check(fleet, spec, predict_s=0.5)
            assert report.prediction is None
            assert job[:8] in report.unpredicted
            view = await fleet.follow("host-a", job)
            assert view.phase is Phase.COMPLETE


@pytest.mark.slow
async def test_a_move_ends_a_probe_that_is_under_way_and_is_made() -> None:
    with scratch_folder() as folder:
        async with running_fleet(folder) as fleet:
            spec = fleet.start_guest("host-a")
            reports: list[CheckReport] = []

            async def ask() -> None:
                reports.append(await check(fleet, spec, predict_s=20.0))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                # The guest keeps the word of its last log: in this test it is the first one.
                await until(
                    lambda: fleet.describe("host-a", spec.guest_id).tracking != "none", "its dirty log"
                )
                began_s = anyio.current_time()
                view = await fleet.move(spec.guest_id, "host-a", "host-b")
                assert view.phase is Phase.COMPLETE
                assert anyio.current_time() - began_s < 15
            assert reports[0].prediction is None
            assert "began while it was watched" in reports[0].unpredicted
            await fleet.check_runs_only_at("host-b", spec.guest_id)


@pytest.mark.slow
async def test_checks_of_one_guest_at_once_share_a_probe() -> None:
    with scratch_folder() as folder:
        async with running_fleet(folder) as fleet:
            spec = fleet.start_guest("host-a")
            reports: list[CheckReport] = []

            async def ask() -> None:
                reports.append(await check(fleet, spec, predict_s=0.5))

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(ask)
            loads = [one.prediction.load for one in reports if one.prediction]
            assert len(loads) == 3
            assert loads[0] is not None
            assert loads[1:] == loads[:1] * 2
            await fleet.check_runs_only_at("host-a", spec.guest_id)


@pytest.mark.slow
async def test_a_move_that_somebody_took_a_hand_in_is_no_lesson() -> None:
    with scratch_folder() as folder:
        async with running_fleet(folder) as fleet:
            spec = fleet.start_guest("host-a", **NOISE)
            job = await fleet.start(spec.guest_id, "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
            await fleet.until("host-a", job, in_precopy)
            assert await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0)) == Done()
            assert (await fleet.follow("host-a", job)).phase is Phase.COMPLETE
            (one,) = (await listed(fleet)).moves
            assert one.outcome is None


@pytest.mark.slow
async def test_predictions_are_of_guests_that_the_operator_may_see() -> None:
    rules = (
        '[[allow]]\noperators = ["*"]\nmay = ["view", "move"]\nguests = ["open-*"]\n'
        '[[allow]]\nagents = ["*"]\nmay = ["send-guests"]\n'
    )
    with scratch_folder() as folder:
        async with running_fleet(folder, rules=rules) as fleet:
            seen, unseen = (fleet.start_guest("host-a", name=name) for name in ("open-1", "closed-1"))
            refused = await fleet.ask("host-a", Check(guest=unseen.guest_id, to="host-b", predict_s=0.2))
            assert isinstance(refused, Refused)
            await check(fleet, seen, predict_s=0.2)
            names = [one.prediction.conditions.guest_name for one in (await listed(fleet)).moves]
            assert names == ["open-1"]
