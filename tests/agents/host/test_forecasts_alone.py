"""What an agent predicts a move from, without agents and guests."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import anyio
import pytest

from agents.host.forecasts import GOODPUT_HOLDS_S, LOAD_HOLDS_S, Forecasts, Foretold
from agents.host.jobs import Job
from agents.host.parts import HostParts
from agents.predictions import PredictionFile
from migrate.forecast import Basis, Conditions, Prediction
from migrate.phases import Phase
from migrate.stats import PageCounts, Report
from tests.agents.test_predictions import prediction

pytestmark = pytest.mark.anyio

JOB = cast(Job, SimpleNamespace(job_id="j" * 32))


def forecasts_in(folder: Path, *, seconds: float = 0.0) -> Forecasts:
    parts = SimpleNamespace(settings=SimpleNamespace(agent=SimpleNamespace(state_dir=folder)))
    return Forecasts(cast(HostParts, parts), cpu=lambda: seconds)


def kept(folder: Path, *, age_s: float = 0.0, goodput: float | None = 5e7) -> Prediction:
    """A prediction that the agent made some time ago."""
    made = prediction(1, made_at_s=time.time() - age_s)
    made = replace(made, conditions=replace(made.conditions, goodput_bytes_per_s=goodput))
    PredictionFile(folder / "predictions.jsonl").append(made)
    return made


def report(**changed: object) -> Report:
    values: dict[str, object] = {
        "phase": Phase.ROLLED_BACK,
        "guest_id": "id-of-vm1",
        "guest_name": "vm1",
        "source": "host-a",
        "destination": "host-b",
        "runs_on": "host-a",
        "error": "no",
        "total_s": 1.0,
        "downtime": None,
        "rounds": (),
        "counts": PageCounts(),
        "ram_bytes": 1,
        "wire_bytes": 1,
        "resent_bytes": 0,
        "link_breaks": 0,
        "tracking": "",
        "source_digest": None,
        "destination_digest": None,
        **changed,
    }
    return Report(**values)  # type: ignore[arg-type]


async def begun(forecasts: Forecasts, conditions: Conditions) -> Foretold:
    """Have a move foretold, and wait for that."""
    foretold = Foretold()
    await forecasts.begin(JOB, conditions, foretold)
    assert foretold.is_over.is_set()
    return foretold


async def test_a_move_takes_the_prediction_of_a_check_just_made(tmp_path: Path) -> None:
    made = kept(tmp_path)
    wanted = replace(made.conditions, goodput_bytes_per_s=None)
    forecasts = forecasts_in(tmp_path)
    foretold = await begun(forecasts, wanted)
    assert foretold.ticket is not None
    assert foretold.ticket.prediction == made
    # Once: what a second move at the same time takes is its own.
    second = await begun(forecasts, wanted)
    assert second.ticket is not None
    assert second.ticket.prediction.prediction_id != made.prediction_id


@pytest.mark.parametrize(
    ("age_s", "changed"),
    [(LOAD_HOLDS_S + 1, {}), (0.0, {"downtime_limit_s": 0.01}), (0.0, {"destination": "host-c"})],
)
async def test_an_old_check_or_one_of_another_move_is_not_taken(
    tmp_path: Path, age_s: float, changed: dict[str, object]
) -> None:
    made = kept(tmp_path, age_s=age_s)
    foretold = await begun(forecasts_in(tmp_path), replace(made.conditions, **changed))  # type: ignore[arg-type]
    assert foretold.ticket is not None
    assert foretold.ticket.prediction.prediction_id != made.prediction_id
    assert foretold.ticket.prediction.basis is Basis.ASSUMED


@pytest.mark.parametrize(("age_s", "goodput"), [(LOAD_HOLDS_S + 1, 5e7), (GOODPUT_HOLDS_S + 1, None)])
async def test_what_a_check_measured_of_the_path_is_known_for_an_hour(
    tmp_path: Path, age_s: float, goodput: float | None
) -> None:
    made = kept(tmp_path, age_s=age_s)
    foretold = await begun(forecasts_in(tmp_path), replace(made.conditions, goodput_bytes_per_s=None))
    assert foretold.ticket is not None
    assert foretold.ticket.prediction.conditions.goodput_bytes_per_s == goodput


async def test_moves_at_once_share_the_cpu_and_none_is_charged_with_it(tmp_path: Path) -> None:
    made = kept(tmp_path)
    forecasts = forecasts_in(tmp_path)
    first = await begun(forecasts, made.conditions)
    second = await begun(forecasts, made.conditions)
    for foretold in (first, second):
        await forecasts.ended(foretold, report(), is_comparable=True)
    third = await begun(forecasts, made.conditions)
    await forecasts.ended(third, report(), is_comparable=True)
    cpu = [one.outcome.cpu_s for one in await forecasts.moves() if one.outcome]
    assert cpu == [None, None, 0.0]


async def test_a_prediction_is_made_beside_its_move_and_is_none_of_its_cpu(tmp_path: Path) -> None:
    made = kept(tmp_path, age_s=LOAD_HOLDS_S + 1)
    forecasts, foretold = Forecasts(forecasts_in(tmp_path)._host, cpu=time.process_time), Foretold()
    async with anyio.create_task_group() as beside:
        beside.start_soon(forecasts.begin, JOB, made.conditions, foretold)
        # The move is over at once: its end waits for what was foretold of it.
        await forecasts.ended(foretold, report(), is_comparable=True)
    (outcome,) = (one.outcome for one in await forecasts.moves() if one.outcome)
    assert foretold.ticket is not None
    assert outcome.prediction_id == foretold.ticket.prediction.prediction_id
    assert outcome.cpu_s is not None
    # A prediction takes some 50 ms.
    assert 0 <= outcome.cpu_s < 0.03


async def test_a_move_that_is_not_comparable_has_no_outcome(tmp_path: Path) -> None:
    made = kept(tmp_path)
    forecasts = forecasts_in(tmp_path)
    foretold = await begun(forecasts, made.conditions)
    await forecasts.ended(foretold, report(), is_comparable=False)
    await forecasts.ended(await begun(forecasts, made.conditions), None, is_comparable=True)
    assert all(one.outcome is None for one in await forecasts.moves())
    nothing = Foretold()
    nothing.is_over.set()
    await forecasts.ended(nothing, report(), is_comparable=True)


async def test_a_directory_that_cannot_be_written_costs_no_move(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = kept(tmp_path)
    (tmp_path / "file").write_text("")
    foretold = await begun(forecasts_in(tmp_path / "file"), made.conditions)
    assert foretold.ticket is not None
    assert "prediction not written" in caplog.text


async def test_a_mistake_in_a_prediction_costs_no_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **more: object) -> Prediction:
        raise ZeroDivisionError

    monkeypatch.setattr("agents.host.forecasts.predict", broken)
    assert (await begun(forecasts_in(tmp_path), prediction().conditions)).ticket is None
    assert "could not be predicted" in caplog.text


async def test_nobody_is_in_the_way_of_a_guest_that_is_not_probed(tmp_path: Path) -> None:
    with anyio.fail_after(1):
        await forecasts_in(tmp_path).make_way("id-of-vm1")
