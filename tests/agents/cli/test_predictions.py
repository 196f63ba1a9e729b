from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from agents.api import Check, CheckReport, GetHost, ListGuests, ListPredictions, PredictionList
from agents.cli.foretold import foretold_lines
from agents.cli.main import main
from agents.cli.output import Exit
from migrate.forecast import PROBE_S, Basis, PastMove, Prediction
from migrate.lessons import scores
from migrate.preflight import capacity
from tests.agents.cli.conftest import Agents, Respond
from tests.agents.scripted_agent import guest_facts, guest_list, host_view
from tests.agents.test_predictions import outcome, prediction

CONVERGING = prediction(1, converging_share=1.0, remedy=None)
MOVES = (
    PastMove(prediction=CONVERGING, outcome=outcome(1)),
    PastMove(prediction=prediction(2), outcome=None),
)


def source(made: Prediction | None, unpredicted: str = "", moves: Sequence[PastMove] = MOVES) -> Respond:
    def respond(request: object) -> Sequence[object]:
        match request:
            case ListGuests():
                return [guest_list("host-a", guest_facts())]
            case GetHost():
                return [host_view("host-a", peers=("host-b",))]
            case Check(to=to):
                findings = (capacity.MEMORY.ok("host-b has room"),)
                return [
                    CheckReport(
                        guest="vm1", to=to, findings=findings, prediction=made, unpredicted=unpredicted
                    )
                ]
            case ListPredictions():
                return [PredictionList(host="host-a", moves=tuple(moves), scores=scores(moves))]
            case _:
                raise AssertionError(f"nobody asks {request}")

    return respond


def test_a_check_predicts_only_when_it_is_asked_to(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source(None)
    assert main(["check", "vm1", "--to", "host-b"]) == Exit.OK
    assert "predicted" not in capsys.readouterr().out
    main(["check", "vm1", "--to", "host-b", "--predict"])
    main(["check", "vm1", "--to", "host-b", "--predict-for", "2s", "--bandwidth", "10MB/s"])
    asked = agents.requests(Check)
    assert [one.predict_s for one in asked if isinstance(one, Check)] == [0.0, PROBE_S, 2.0]
    assert isinstance(asked[2], Check)
    assert asked[2].bandwidth_bytes_per_s == 10_000_000


@pytest.mark.parametrize("predict_for", ["1ms", "31s"])
def test_no_guest_is_watched_for_longer_than_a_check_may_take(agents: Agents, predict_for: str) -> None:
    assert main(["check", "vm1", "--to", "host-b", "--predict-for", predict_for]) == Exit.USAGE


def test_a_prediction_is_shown_with_its_intervals(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = source(CONVERGING)
    assert main(["check", "vm1", "--to", "host-b", "--predict"]) == Exit.OK
    shown = capsys.readouterr().out
    assert "predicted total        1.00 s (500 ms to 2.00 s)" in shown
    assert "converges within a downtime limit of 300 ms (100 % of the rehearsals)" in shown
    assert "the guest was watched; corrected by 3 past moves" in shown
    assert main(["check", "vm1", "--to", "host-b", "--predict", "--json"]) == Exit.OK
    printed = json.loads(capsys.readouterr().out)["prediction"]
    assert printed["figures"]["total_s"] == {"low": 0.5, "median": 1.0, "high": 2.0}
    assert main(["check", "vm1", "--to", "any", "--predict"]) == Exit.OK
    assert "1.00 s (500 ms to 2.00 s)" in capsys.readouterr().out


def test_one_that_will_not_converge_names_the_limit_that_would() -> None:
    lines = "\n".join(foretold_lines(prediction()))
    assert "does NOT converge" in lines
    assert "--downtime-limit 1s" in lines
    assert "--bandwidth" not in lines


@pytest.mark.parametrize("basis", Basis)
def test_each_basis_has_words(basis: Basis) -> None:
    assert foretold_lines(replace(CONVERGING, basis=basis))


def test_why_there_is_no_prediction_is_said_and_costs_no_check(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source(None, "vm1 is being moved")
    assert main(["check", "vm1", "--to", "host-b", "--predict"]) == Exit.OK
    assert "not predicted: vm1 is being moved" in capsys.readouterr().out


def test_predictions_are_shown_beside_their_outcomes_and_scored(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    agents.hosts["host-a"] = source(None)
    assert main(["predictions"]) == Exit.OK
    shown = capsys.readouterr().out
    # Within its interval, and beyond it.
    assert "1.20 s (500 ms to 2.00 s)" in shown
    assert "10.0 ms! (500 ms to 2.00 s)" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["total_s", "1", "100", "%", "1.20", "4.00"] in lines
    assert ["downtime_s", "1", "0", "%", "0.01", "4.00"] in lines
    assert ["cpu_s", "0", "-", "-", "-"] in lines
    assert main(["predictions", "--json", "--guest", "vm1", "--host", "host-a"]) == Exit.OK
    printed = json.loads(capsys.readouterr().out)
    assert printed["predictions"][1]["outcome"] is None
    assert printed["scores"][0]["coverage"] == 1.0
    assert agents.requests(ListPredictions)[-1] == ListPredictions(guest="vm1")


def test_no_predictions_are_said_to_be_none(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = source(None, moves=())
    assert main(["predictions"]) == Exit.OK
    assert "no predictions" in capsys.readouterr().err


def test_a_host_that_does_not_answer_is_named(agents: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    agents.hosts["host-a"] = source(None)
    agents.hosts["host-b"] = None
    assert main(["predictions"]) == Exit.UNREACHABLE
    assert "host-b" in capsys.readouterr().err


def test_names_of_guests_do_not_drive_the_terminal(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = replace(CONVERGING, conditions=replace(CONVERGING.conditions, guest_name="\x1b[2Jvm"))
    agents.hosts["host-a"] = source(bad, moves=(PastMove(prediction=bad, outcome=None),))
    main(["predictions"])
    main(["check", "vm1", "--to", "host-b", "--predict"])
    assert "\x1b[2J" not in capsys.readouterr().out
