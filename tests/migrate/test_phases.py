from __future__ import annotations

import itertools

import pytest

from migrate.phases import DESTINATION, SOURCE, TERMINAL, Event, Phase, PhaseError, advance, can_cancel

TABLES = [pytest.param(SOURCE, id="source"), pytest.param(DESTINATION, id="destination")]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_pair_has_a_row_or_is_refused(
    table: dict[tuple[Phase, Event], Phase], phase: Phase, event: Event
) -> None:
    if (phase, event) in table:
        assert advance(table, phase, event) is table[phase, event]
    else:
        with pytest.raises(PhaseError):
            advance(table, phase, event)


@pytest.mark.parametrize("table", TABLES)
def test_terminal_phases_have_no_rows(table: dict[tuple[Phase, Event], Phase]) -> None:
    assert not [pair for pair in table if pair[0] in TERMINAL]


@pytest.mark.parametrize("table", TABLES)
def test_past_the_point_of_no_return_a_fault_leads_to_doubt_only(
    table: dict[tuple[Phase, Event], Phase],
) -> None:
    assert table[Phase.SWITCHOVER, Event.FAULT] is Phase.IN_DOUBT
    assert (Phase.SWITCHOVER, Event.CANCEL) not in table
    out_of_doubt = {event for phase, event in table if phase is Phase.IN_DOUBT}
    assert out_of_doubt == {Event.SOURCE_OWNS, Event.DESTINATION_OWNS}


@pytest.mark.parametrize("table", TABLES)
def test_every_phase_with_rows_can_end(table: dict[tuple[Phase, Event], Phase]) -> None:
    ends = set(TERMINAL)
    while True:
        more = {phase for (phase, _), new in table.items() if new in ends} - ends
        if not more:
            break
        ends |= more
    assert {phase for phase, _ in table} <= ends


def test_cancel_is_possible_exactly_before_commit_may_have_left() -> None:
    assert {phase for phase in Phase if can_cancel(phase)} == {
        Phase.SETUP,
        Phase.PREFLIGHT,
        Phase.PRECOPY,
        Phase.STOP,
    }
