from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench import __main__ as bench_main
from bench.__main__ import load, main, scenario_names
from bench.report import read_run


def fake(name: str, *, fails: bool = False) -> ModuleType:
    """A scenario that answers at once."""

    def run(smoke: bool) -> dict[str, object]:
        if fails:
            raise RuntimeError("cannot run here")
        return {"rounds": 1 if smoke else 100, "speed_ratio": 0.75}

    module = ModuleType(f"bench.run_{name}")
    module.__dict__.update(QUESTION=f"How fast is {name}?", run=run)
    return module


@pytest.fixture(autouse=True)
def _scenarios(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("fine", "broken"):
        monkeypatch.setitem(sys.modules, f"bench.run_{name}", fake(name, fails=name == "broken"))
    monkeypatch.setattr(bench_main, "scenario_names", lambda: ["broken", "fine"])


def test_scenarios_are_found_by_their_files(tmp_path: Path) -> None:
    for name in ("run_b.py", "run_a.py", "report.py", "run_.py", "run_c.txt"):
        (tmp_path / name).write_text("")
    assert scenario_names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name", scenario_names())
def test_each_scenario_of_this_checkout_asks_one_question(name: str) -> None:
    assert load(name).question.endswith("?")
    assert "\n" not in load(name).question


def test_the_list_has_each_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "How fast is fine?" in capsys.readouterr().out


def test_a_run_names_its_machine_and_shows_its_figures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["fine", "--json", str(tmp_path / "run.json")]) == 0
    shown = capsys.readouterr().out
    assert " cores, " in shown
    assert "0.75x" in shown
    assert "smoke" not in shown
    assert read_run(tmp_path / "run.json").results == {"fine": {"rounds": 100, "speed_ratio": 0.75}}


def test_one_broken_scenario_lets_the_others_run_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--smoke"]) == 1
    captured = capsys.readouterr()
    assert "0.75x" in captured.out
    assert "error: failed: broken" in captured.out
    assert "cannot run here" in captured.err


@pytest.mark.parametrize("words", [["nothing"], []])
def test_wrong_usage_is_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2


def test_rows_that_nobody_knows_are_an_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match=r"no row lo_wr1; there are: loopback_wr10, .*100mbit_wr200"):
        load("qemu").run(True, rows=["lo_wr1"])
    with pytest.raises(ValueError, match=r"no way rdma; there are: plain, tls"):
        load("qemu").run(True, ways=["rdma"])


def test_seeds_are_for_scenarios_that_have_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(smoke: bool, seeds: int = 3) -> dict[str, object]:
        return {"seeds": seeds}

    monkeypatch.setattr(sys.modules["bench.run_fine"], "run", run)
    assert main(["fine", "--seeds", "17"]) == 0
    assert "17" in capsys.readouterr().out
    assert main(["fine", "broken", "--seeds", "17"]) == 2
    assert "no seeds in broken" in capsys.readouterr().out


def test_a_smoke_run_of_nothing_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_main, "scenario_names", list)
    assert main(["--smoke"]) == 2


def test_two_runs_are_compared_by_factor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    main(["fine", "--json", files[0]])
    main(["fine", "--smoke", "--json", files[1]])
    capsys.readouterr()
    assert main(["compare", *files]) == 0
    shown = capsys.readouterr().out
    assert "a smoke run" in shown
    assert "0.010" in shown


def test_a_file_of_something_else_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "error:" in capsys.readouterr().out
