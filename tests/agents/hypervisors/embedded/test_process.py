from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from agents.hypervisors.embedded.control import Verb
from agents.hypervisors.embedded.errors import RequestRefused
from agents.hypervisors.embedded.process import (
    MAX_BEHIND_SLICES,
    MAX_SLICE_INSTRUCTIONS,
    SLICE_S,
    GuestProcess,
    Pace,
)
from agents.hypervisors.embedded.spec import EmbeddedSpec
from tests.agents.hypervisors.embedded.conftest import SpecMaker

OWNER, STRANGER = 1, 2
DEADLINE_S = 10.0


class Guest:
    """A guest's process as a thread of this one, without its socket."""

    def __init__(self, spec: EmbeddedSpec, *, is_incoming: bool) -> None:
        self.process = GuestProcess(spec, is_incoming=is_incoming)
        self.thread = threading.Thread(target=self.process.run)
        self.thread.start()

    def ask(self, verb: Verb, argument: bytes = b"", *, connection: int = STRANGER) -> dict[str, object]:
        return self.process.answer(verb, argument, connection).body

    def await_instructions(self, more_than: int) -> int:
        while True:
            instructions = self.ask(Verb.DESCRIBE)["instructions"]
            assert isinstance(instructions, int)
            if instructions > more_than:
                return instructions

    def has_ended(self) -> bool:
        self.thread.join(DEADLINE_S)
        return not self.thread.is_alive()


GuestMaker = Callable[..., Guest]


@contextmanager
def running(guest: Guest) -> Iterator[Guest]:
    try:
        yield guest
    finally:
        guest.ask(Verb.QUIT)
        assert guest.has_ended()
        guest.process.close()


def test_a_pause_stops_everything_and_a_resume_goes_on(make_spec: SpecMaker) -> None:
    with running(Guest(make_spec(), is_incoming=False)) as guest:
        guest.await_instructions(0)
        guest.ask(Verb.PAUSE)
        guest.ask(Verb.PAUSE)
        before = guest.ask(Verb.FINGERPRINT), guest.ask(Verb.SAVE_STATE), guest.ask(Verb.DESCRIBE)
        after = guest.ask(Verb.FINGERPRINT), guest.ask(Verb.SAVE_STATE), guest.ask(Verb.DESCRIBE)
        assert before == after
        paused_at = before[2]["instructions"]
        assert isinstance(paused_at, int)
        guest.ask(Verb.RESUME)
        guest.ask(Verb.RESUME)
        guest.await_instructions(paused_at)
        assert guest.ask(Verb.DESCRIBE)["errors"] == 0


def test_a_guest_stops_at_its_last_instruction(make_spec: SpecMaker) -> None:
    with running(Guest(make_spec(max_instructions=777), is_incoming=False)) as guest:
        assert guest.await_instructions(776) == 777
        described = guest.ask(Verb.DESCRIBE)
        assert described["has_ended"] is True
        assert described["state"] == "running"


def test_an_incoming_guest_ends_with_the_connection_that_holds_it(make_spec: SpecMaker) -> None:
    guest = Guest(make_spec(), is_incoming=True)
    guest.ask(Verb.HOLD, connection=OWNER)
    guest.process.connection_closed(STRANGER)
    assert guest.ask(Verb.DESCRIBE)["state"] == "incoming"
    guest.process.connection_closed(OWNER)
    assert guest.has_ended()
    guest.process.close()


def test_a_loaded_guest_stays_when_that_connection_closes(make_spec: SpecMaker) -> None:
    with running(Guest(make_spec(), is_incoming=False)) as source:
        source.await_instructions(0)
        source.ask(Verb.PAUSE)
        state = source.ask(Verb.SAVE_STATE)["state"]
        assert isinstance(state, bytes)
        with running(Guest(make_spec(), is_incoming=True)) as guest:
            guest.ask(Verb.HOLD, connection=OWNER)
            guest.ask(Verb.LOAD_STATE, state, connection=OWNER)
            guest.process.connection_closed(OWNER)
            assert guest.ask(Verb.DESCRIBE)["state"] == "loaded"
            assert guest.ask(Verb.SAVE_STATE)["state"] == state


def test_a_guest_that_refused_its_state_does_not_run(make_spec: SpecMaker) -> None:
    with running(Guest(make_spec(), is_incoming=True)) as guest:
        guest.ask(Verb.HOLD, connection=OWNER)
        with pytest.raises(RequestRefused, match="msgpack"):
            guest.ask(Verb.LOAD_STATE, b"\xc1")
        for verb in (Verb.RESUME, Verb.PAUSE, Verb.SAVE_STATE, Verb.FINGERPRINT):
            with pytest.raises(RequestRefused):
                guest.ask(verb)
        assert guest.ask(Verb.DESCRIBE)["instructions"] == 0


def test_a_running_guest_gives_and_takes_no_state(make_spec: SpecMaker) -> None:
    with running(Guest(make_spec(), is_incoming=False)) as guest:
        for verb in (Verb.SAVE_STATE, Verb.LOAD_STATE, Verb.FINGERPRINT, Verb.HOOK_HARVEST):
            with pytest.raises(RequestRefused):
                guest.ask(verb)


def test_a_fault_is_told_and_final(make_spec: SpecMaker) -> None:
    with running(Guest(make_spec(), is_incoming=False)) as guest:
        guest.process.ram.view[0x1000:0x1200] = b"\x0f\x0b" * 256
        guest.ask(Verb.HOOK_START)  # which makes the emulator read the program again
        while guest.ask(Verb.DESCRIBE)["state"] != "faulted":
            pass
        assert "CPU stopped at 0x1" in str(guest.ask(Verb.DESCRIBE)["fault"])
        with pytest.raises(RequestRefused, match="faulted"):
            guest.ask(Verb.RESUME)


def test_the_write_hook_finds_exactly_the_pages_that_change(make_spec: SpecMaker) -> None:
    with running(Guest(make_spec(disk_path=None), is_incoming=False)) as guest:
        guest.await_instructions(0)
        guest.ask(Verb.PAUSE)
        guest.ask(Verb.HOOK_START)
        before = np.frombuffer(bytes(guest.process.ram.view), np.uint64).reshape(-1, 512)
        at = guest.await_instructions(-1)
        guest.ask(Verb.RESUME)
        guest.await_instructions(at + 5000)
        guest.ask(Verb.PAUSE)
        after = np.frombuffer(bytes(guest.process.ram.view), np.uint64).reshape(-1, 512)
        bitmap = guest.ask(Verb.HOOK_HARVEST)["bitmap"]
        assert isinstance(bitmap, bytes)
        found = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little").astype(bool)
        assert (found == (before != after).any(axis=1)).all()
        assert found.any()
        assert guest.ask(Verb.HOOK_HARVEST)["bitmap"] == bytes(len(bitmap))
        guest.ask(Verb.HOOK_STOP)
        guest.ask(Verb.HOOK_STOP)
        assert guest.ask(Verb.DESCRIBE)["tracking"] == "none"


def test_the_pace_gives_what_time_asks_for() -> None:
    pace = Pace(1_000_000)
    pace.restart(100.0)
    assert pace.due(100.0) == 0
    assert pace.due(100.005) == pytest.approx(5000, abs=1)
    pace.executed(5000)
    assert pace.due(100.005) <= 1
    assert pace.due(100.010) == pytest.approx(5000, abs=1)


def test_the_pace_forgives_a_long_stop_and_goes_on_from_there() -> None:
    pace = Pace(1_000_000)
    pace.restart(0.0)
    most = int(1_000_000 * SLICE_S) * MAX_BEHIND_SLICES + 1
    assert pace.due(1000.0) == most
    pace.executed(most)
    assert pace.due(1000.0) == 0
    assert pace.due(1000.005) == pytest.approx(5000, abs=1)


def test_no_slice_is_longer_than_the_limit() -> None:
    pace = Pace(1e12)
    pace.restart(0.0)
    assert pace.due(1.0) == MAX_SLICE_INSTRUCTIONS


def test_a_slow_guest_loses_no_instruction_to_rounding() -> None:
    pace = Pace(10)
    pace.restart(0.0)
    executed = 0
    for step in range(1, 2001):
        due = pace.due(step * SLICE_S)
        pace.executed(due)
        executed += due
    assert executed == pytest.approx(100, abs=1)
