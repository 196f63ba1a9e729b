from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import report
from bench.report import (
    Machine,
    ReportInvalid,
    Run,
    changes,
    figures,
    read_run,
    shown,
    this_machine,
    write_run,
)

MACHINE = Machine(cpu="A CPU", cores=2, memory_bytes=1 << 33, kernel="Linux 6.1", python="CPython 3.11.7")


def run_of(**results: dict[str, object]) -> Run:
    return Run(machine=MACHINE, commit="abc", is_smoke=False, results=results)


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = run_of(link={"sealed_bytes_per_s": 1.5e9, "ratios": {"sealed_ratio": 0.6}, "how": "two threads"})
    write_run(tmp_path / "run.json", run)
    assert read_run(tmp_path / "run.json") == run


def test_figures_are_the_numbers_alone() -> None:
    result = {"a_s": 1, "inner": {"b_ratio": 0.5}, "words": "x", "is_true": True, "many": [1, 2]}
    assert dict(figures(result)) == {"a_s": 1.0, "inner.b_ratio": 0.5}


def test_changes_are_of_figures_that_both_runs_have() -> None:
    before = run_of(link={"a_s": 2.0, "gone_s": 1.0, "zero_s": 0.0}, gone={"x_s": 1.0})
    after = run_of(link={"a_s": 3.0, "new_s": 1.0, "zero_s": 1.0})
    found = [(change.figure, change.factor) for change in changes(before, after)]
    assert found == [("a_s", 1.5), ("zero_s", None)]


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [("x_ratio", 0.5, "0.5x"), ("x_s", 0.0063119, "0.006312"), ("x_bytes_per_s", 1.5e9, "1,500,000,000")],
)
def test_figures_are_short(figure: str, value: float, words: str) -> None:
    assert shown(figure, value) == words


def test_this_machine_has_a_name_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.memory_bytes > 1 << 20


def test_a_machine_that_does_not_name_its_cpu_is_named_by_its_kind(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name :\n")
    assert report._cpu_model(tmp_path / "cpuinfo")
    assert report._cpu_model(tmp_path / "none")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReportInvalid, match="No such file"):
        read_run(tmp_path / "none.json")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.sampled_from([b"{}", b'{"machine": {}}', b"[]", b'{"machine": 1}']))
def test_garbage_raises_only_report_invalid(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "garbage.json"
    path.write_bytes(garbage)
    with pytest.raises(ReportInvalid):
        read_run(path)
