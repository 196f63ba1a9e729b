from __future__ import annotations

import pytest

from agents.host.pace import BURST_CALLS, CALLS_PER_S, Pace
from transport.tls import Identity, Role

EVA = Identity(role=Role.OPERATOR, name="eva")
BOB = Identity(role=Role.OPERATOR, name="bob")


def test_a_burst_waits_for_nothing_and_what_follows_for_the_rate() -> None:
    pace = Pace()
    waits = [pace.wait_s(EVA, 100.0) for _ in range(BURST_CALLS + 2)]
    assert max(waits[:BURST_CALLS]) == pytest.approx(0.0, abs=1e-9)
    assert waits[BURST_CALLS:] == pytest.approx([1 / CALLS_PER_S, 2 / CALLS_PER_S])


def test_nobody_waits_for_another_peer() -> None:
    pace = Pace()
    for _ in range(3 * BURST_CALLS):
        pace.wait_s(EVA, 0.0)
    assert pace.wait_s(BOB, 0.0) == 0.0


def test_who_asks_at_the_rate_never_waits() -> None:
    pace = Pace()
    assert not any(pace.wait_s(EVA, number / CALLS_PER_S) > 1e-9 for number in range(10 * BURST_CALLS))


def test_quiet_peers_are_forgotten_and_busy_ones_are_not() -> None:
    pace = Pace()
    for _ in range(BURST_CALLS):
        pace.wait_s(EVA, 0.0)
    for number in range(1000):
        pace.wait_s(Identity(role=Role.OPERATOR, name=f"n{number}"), 1.0)
    assert pace.wait_s(EVA, 0.0) > 0.0
