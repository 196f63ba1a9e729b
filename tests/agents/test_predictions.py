from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from agents.api import CONTROL_SCHEMA, MAX_LISTED_PREDICTIONS, PredictionList
from agents.predictions import (
    MAX_KEPT,
    MAX_LINE_BYTES,
    MAX_OPEN,
    PredictionFile,
    PredictionTable,
)
from migrate.compression import Compression
from migrate.forecast import (
    Basis,
    Conditions,
    ContentSample,
    Figures,
    GuestLoad,
    Interval,
    MoveOutcome,
    PastMove,
    Prediction,
    Remedy,
    WriteWindow,
)
from migrate.lessons import scores
from migrate.phases import Phase
from migrate.plan import OnTimeout

_SOME = Interval(low=0.5, median=1.0, high=2.0)
_FIGURES = Figures(total_s=_SOME, downtime_s=_SOME, wire_bytes=_SOME, cpu_s=_SOME)


def prediction(number: int = 0, **changed: object) -> Prediction:
    """One with everything in it."""
    values: dict[str, object] = {
        "prediction_id": f"{number:032x}",
        "made_at_s": 1.5e9 + number,
        "conditions": Conditions(
            guest_id="id-of-vm1",
            guest_name="vm1",
            hypervisor="embedded",
            source="host-a",
            destination="host-b",
            ram_bytes=1 << 30,
            downtime_limit_s=0.3,
            timeout_s=0.0,
            on_timeout=OnTimeout.ABORT,
            bandwidth_bytes_per_s=1e8,
            goodput_bytes_per_s=None,
            is_offline=False,
            compression=Compression.AUTO,
            audit=True,
        ),
        "basis": Basis.MEASURED,
        "load": GuestLoad(
            populated_bytes=1 << 29,
            windows=tuple(WriteWindow(window_s=0.1 * n + 0.1, pages=n) for n in range(5)),
            sample=ContentSample(pages=512, zero_pages=5, duplicate_pages=7, zstd_bytes=10),
            took_s=1.0,
        ),
        "modelled": _FIGURES,
        "figures": _FIGURES,
        "learned_from": 3,
        "converging_share": 0.25,
        "remedy": Remedy(downtime_limit_s=1.0, bandwidth_bytes_per_s=None),
        "because": "12 rounds brought no new minimum",
        **changed,
    }
    return Prediction(**values)  # type: ignore[arg-type]


def outcome(number: int = 0) -> MoveOutcome:
    return MoveOutcome(
        prediction_id=f"{number:032x}",
        job="j",
        ended_at_s=2.0,
        phase=Phase.COMPLETE,
        total_s=1.2,
        downtime_s=0.01,
        wire_bytes=1,
        cpu_s=None,
        fixed_s=0.005,
        overhead_s=0.4,
        windows=(WriteWindow(window_s=1.0, pages=3),),
    )


def test_what_was_kept_is_read_again_with_its_outcome(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "state" / "p.jsonl")
    file.append(prediction(1))
    file.append(prediction(2))
    file.append(outcome(1))
    found = PredictionFile(file.path).read().moves()
    assert [one.prediction for one in found] == [prediction(1), prediction(2)]
    assert [one.outcome for one in found] == [outcome(1), None]
    assert file.path.stat().st_mode & 0o077 == 0
    file.close()
    file.close()


def test_a_file_that_is_not_there_is_an_empty_table(tmp_path: Path) -> None:
    assert PredictionFile(tmp_path / "p.jsonl").read().moves() == []


def test_a_full_file_is_moved_away_and_still_read(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "p.jsonl", rotate_bytes=8 << 10)
    for number in range(20):
        file.append(prediction(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * (8 << 10)
    numbers = [int(one.prediction.prediction_id, 16) for one in file.read().moves()]
    assert numbers == list(range(numbers[0], 20))
    assert len(numbers) >= 4
    # An outcome in the new file belongs to a prediction in the one before it.
    file.append(outcome(numbers[0]))
    assert file.read().moves()[0].outcome is not None


def lines_of(tmp_path: Path) -> tuple[list[object], list[object]]:
    file = PredictionFile(tmp_path / "good.jsonl")
    file.append(prediction(1))
    file.append(outcome(1))
    one, two = (json.loads(line) for line in file.path.read_text().splitlines())
    return one, two


@pytest.mark.parametrize(
    "bad",
    [
        b"\x00\xff\xfe",
        b"{",
        b"null",
        b"[]",
        b'["prediction"]',
        b'["prediction",{}]',
        b'["nothing-of-ours",{}]',
        b'["move-outcome",{"total_s":NaN}]',
        b"[" * 5000,
        b"1" * 5000,
        b'"\\ud800"',
        b" " * (MAX_LINE_BYTES + 1),
    ],
)
def test_a_corrupt_line_costs_itself_and_a_line_in_the_log(
    bad: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = PredictionFile(tmp_path / "p.jsonl")
    file.append(prediction(1))
    file.close()
    with file.path.open("ab") as raw:
        raw.write(bad + b"\n")
    file.append(outcome(1))
    with caplog.at_level(logging.WARNING):
        (found,) = file.read().moves()
    assert found.outcome == outcome(1)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("made_at_s", 1 << 70),
        ("made_at_s", float("nan")),
        ("made_at_s", "now"),
        ("basis", "guessed"),
        ("figures", None),
        ("load", {}),
        ("learned_from", 1.5),
        ("converging_share", True),
    ],
)
def test_a_line_with_a_value_that_cannot_be_is_left_out(key: str, value: object, tmp_path: Path) -> None:
    line, _ = lines_of(tmp_path)
    assert isinstance(line[1], dict)
    line[1][key] = value
    file = PredictionFile(tmp_path / "p.jsonl")
    file.path.write_text(json.dumps(line) + "\n")
    assert file.read().moves() == []


def test_half_a_line_at_the_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "p.jsonl")
    file.append(prediction(1))
    file.close()
    file.path.write_bytes(file.path.read_bytes() + b'["prediction",{"predi')
    file.append(prediction(2))
    assert len(file.read().moves()) == 2


def test_what_is_no_file_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl.1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("x\n")
    with caplog.at_level(logging.WARNING):
        assert PredictionFile(tmp_path / "p.jsonl").read().moves() == []
    assert len(caplog.records) == 2


def test_of_a_file_that_somebody_made_huge_the_end_is_read(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "p.jsonl", rotate_bytes=8 << 10)
    file.path.write_bytes(b"x" * (1 << 20) + b"\n")
    line, _ = lines_of(tmp_path)
    with file.path.open("ab") as raw:
        raw.write(json.dumps(line).encode() + b"\n")
    assert len(file.read().moves()) == 1


def test_the_table_forgets_the_oldest() -> None:
    table = PredictionTable()
    for number in range(MAX_KEPT + 2):
        table.add(prediction(number))
        table.add(outcome(number))
    table.add(prediction(MAX_KEPT + 2))
    moves = table.moves()
    assert len(moves) == MAX_KEPT + 1
    assert moves[0].prediction.prediction_id == f"{2:032x}"
    table.add(outcome(0))
    assert sum(one.outcome is not None for one in table.moves()) == MAX_KEPT


def test_checks_that_no_move_followed_push_out_no_lesson() -> None:
    table = PredictionTable()
    table.add(prediction(0))
    table.add(outcome(0))
    for number in range(1, 3 * MAX_OPEN):
        table.add(prediction(number))
    moves = table.moves()
    assert len(moves) == 1 + MAX_OPEN
    assert moves[0].outcome == outcome(0)
    assert moves[-1].prediction == prediction(3 * MAX_OPEN - 1)


def test_as_many_as_are_listed_fit_into_one_message() -> None:
    moves = tuple(
        PastMove(prediction=prediction(n), outcome=outcome(n)) for n in range(MAX_LISTED_PREDICTIONS)
    )
    listed = PredictionList(host="host-a", moves=moves, scores=scores(moves))
    assert CONTROL_SCHEMA.decode(CONTROL_SCHEMA.encode(listed)) == listed


def test_an_outcome_without_its_prediction_is_not_kept() -> None:
    table = PredictionTable()
    table.add(outcome(5))
    assert table.moves() == []


def test_a_line_that_would_be_too_long_is_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = PredictionFile(tmp_path / "p.jsonl")
    with caplog.at_level(logging.WARNING):
        file.append(replace(prediction(), because="x" * MAX_LINE_BYTES))
    assert not file.path.exists()
    assert len(caplog.records) == 1
