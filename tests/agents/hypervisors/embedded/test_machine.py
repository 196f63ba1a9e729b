from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.hypervisors.embedded import program
from agents.hypervisors.embedded.devices import MemorySectors, NoSectors
from agents.hypervisors.embedded.errors import MachineFault, StateInvalid
from agents.hypervisors.embedded.fingerprint import ram_fingerprint
from agents.hypervisors.embedded.machine import Machine
from agents.hypervisors.embedded.ramfile import RamFile
from agents.hypervisors.embedded.spec import (
    CPU_MODELS,
    MAX_STATE_BYTES,
    PAGE_BYTES,
    Content,
    EmbeddedSpec,
    Pattern,
)
from tests.agents.hypervisors.embedded.conftest import GUEST_ID, SpecMaker

# A heartbeat every 128 ticks, so that short runs print and use their disk.
SPEC = EmbeddedSpec(
    guest_id=GUEST_ID,
    name="small",
    ram_bytes=1 << 20,
    working_set_bytes=128 << 10,
    fill_bytes=64 << 10,
    dirty_bytes_per_s=128 * PAGE_BYTES,
    disk_path="/forgotten",
)


@contextmanager
def machine_of(spec: EmbeddedSpec, *, boot: bool = True) -> Iterator[tuple[Machine, RamFile]]:
    ram = RamFile(spec.ram_bytes)
    try:
        machine = Machine(spec, ram, MemorySectors() if spec.disk_path else NoSectors())
        if boot:
            machine.boot()
        yield machine, ram
    finally:
        ram.close()


def outcome(machine: Machine, ram: RamFile) -> tuple[bytes, bytes]:
    return ram_fingerprint(ram.fd, ram.ram_bytes), machine.save_state()


@settings(deadline=None, max_examples=25)
@given(
    spec=st.builds(
        lambda pattern, content, seed: replace(SPEC, pattern=pattern, content=content, seed=seed),
        st.sampled_from(Pattern),
        st.sampled_from(Content),
        st.integers(0, 2**64 - 1),
    ),
    slices=st.lists(st.integers(1, 9000), min_size=1, max_size=6),
    rest=st.integers(1, 9000),
)
def test_a_machine_that_was_moved_equals_one_that_was_not(
    spec: EmbeddedSpec, slices: list[int], rest: int
) -> None:
    with machine_of(spec) as (here, ram), machine_of(spec, boot=False) as (there, ram_there):
        for instructions in slices:
            assert here.run_slice(instructions) == instructions
        state = here.save_state()
        there.load_state(state)
        assert there.save_state() == state
        ram_there.write(0, ram.view)
        there.run_slice(rest)
        with machine_of(spec) as (unmoved, ram_unmoved):
            unmoved.run_slice(sum(slices) + rest)
            assert outcome(there, ram_there) == outcome(unmoved, ram_unmoved)
        assert there.counters().errors == 0


def test_a_run_long_enough_prints_and_keeps_sectors_and_finds_no_error() -> None:
    with machine_of(SPEC) as (machine, _):
        machine.run_slice(40_000)
        counters = machine.counters()
        assert counters.heartbeats == machine.disk.sectors_written == counters.ticks // 128
        assert machine.console.tail.startswith(b"t0000000000000080\nt0000000000000100\n")
        assert counters.errors == 0


def test_the_guest_notices_a_page_that_was_changed_behind_its_back() -> None:
    with machine_of(replace(SPEC, pattern=Pattern.SEQUENTIAL)) as (machine, ram):
        machine.run_slice(10_000)
        for address in range(0x10000, 0x10000 + SPEC.working_set_bytes, PAGE_BYTES):
            ram.view[address] ^= 1
        machine.run_slice(10_000)
        assert machine.counters().errors == SPEC.working_set_bytes // PAGE_BYTES


def test_the_last_instruction_is_the_last() -> None:
    with machine_of(replace(SPEC, max_instructions=1001)) as (machine, _):
        ends = [(machine.run_slice(1000), machine.has_ended) for _ in range(3)]
        assert ends == [(1000, False), (1, True), (0, True)]
        assert machine.instructions == 1001


def test_a_cpu_that_cannot_go_on_says_where() -> None:
    with machine_of(SPEC) as (machine, ram):
        ram.view[program.CODE_ADDRESS : program.CODE_ADDRESS + 2] = b"\x0f\x0b"  # ud2
        with pytest.raises(MachineFault) as caught:
            machine.run_slice(10)
        assert caught.value.rip == program.CODE_ADDRESS


def test_the_state_s_wire_form_is_what_it_was() -> None:
    golden = (Path(__file__).parents[3] / "vectors" / "embedded_state_v1.bin").read_bytes()
    with machine_of(SPEC) as (machine, _):
        machine.run_slice(20_000)
        assert machine.save_state() == golden


def test_watched_writes_are_exactly_the_pages_that_change() -> None:
    with machine_of(SPEC) as (machine, ram):
        machine.run_slice(5000)
        written: set[int] = set()
        machine.watch_writes(
            lambda address, size: written.update((address // PAGE_BYTES, (address + size - 1) // PAGE_BYTES))
        )
        before = np.frombuffer(bytes(ram.view), np.uint64).reshape(-1, PAGE_BYTES // 8)
        machine.run_slice(20_000)
        machine.watch_writes(None)
        after = np.frombuffer(bytes(ram.view), np.uint64).reshape(-1, PAGE_BYTES // 8)
        assert written == set(np.flatnonzero((before != after).any(axis=1)).tolist())
        assert 0x4000 // PAGE_BYTES in written  # the disk's own write, too
        written.clear()
        machine.run_slice(5000)
        assert not written


def test_watching_does_not_change_what_the_guest_computes() -> None:
    with machine_of(SPEC) as (watched, ram), machine_of(SPEC) as (unwatched, other_ram):
        watched.watch_writes(lambda address, size: None)
        watched.run_slice(20_000)
        unwatched.run_slice(20_000)
        assert outcome(watched, ram) == outcome(unwatched, other_ram)


@settings(deadline=None, max_examples=60)
@given(garbage=st.binary(max_size=200))
def test_garbage_is_no_state(garbage: bytes) -> None:
    with machine_of(SPEC) as (machine, _), pytest.raises(StateInvalid):
        machine.load_state(garbage)


def test_no_cut_state_is_taken() -> None:
    with machine_of(SPEC) as (machine, _):
        state = machine.save_state()
        for length in range(0, len(state), 37):
            with pytest.raises(StateInvalid):
                machine.load_state(state[:length])


def test_a_state_longer_than_the_limit_is_not_parsed() -> None:
    with machine_of(SPEC) as (machine, _), pytest.raises(StateInvalid, match="are the most"):
        machine.load_state(bytes(MAX_STATE_BYTES + 1))


def test_a_state_of_another_cpu_model_is_refused_by_name() -> None:
    with machine_of(SPEC) as (machine, _), machine_of(replace(SPEC, cpu_model="EPYC")) as (other, _ram):
        state = other.save_state()
        with pytest.raises(StateInvalid, match="EPYC"):
            machine.load_state(state)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_state_with_one_odd_value_is_refused_or_taken_whole(data: st.DataObject) -> None:
    with machine_of(SPEC) as (machine, _):
        machine.run_slice(1000)
        parts = msgpack.unpackb(machine.save_state())
        odd = data.draw(
            st.none() | st.booleans() | st.integers(-5, -1) | st.just(2**64 - 1) | st.binary(max_size=3)
        )
        where = data.draw(st.sampled_from(["part", "register", "console", "disk"]))
        if where == "part":
            parts[data.draw(st.integers(0, 5))] = odd
        elif where == "register":
            data.draw(st.sampled_from(parts[3]))[data.draw(st.integers(0, 1))] = odd
        else:
            part = parts[4 if where == "console" else 5]
            part[data.draw(st.integers(0, len(part) - 1))] = odd
        with machine_of(SPEC) as (other, _ram):
            try:
                other.load_state(msgpack.packb(parts))
            except StateInvalid:
                return
            other.save_state()


@pytest.mark.parametrize("cpu_model", CPU_MODELS)
def test_the_program_runs_on_every_kind_of_cpu(make_spec: SpecMaker, cpu_model: str) -> None:
    with machine_of(make_spec(cpu_model=cpu_model)) as (machine, _):
        machine.run_slice(10_000)
        assert machine.counters().pages_written > 100
        state = machine.save_state()
        machine.load_state(state)
        assert machine.save_state() == state
