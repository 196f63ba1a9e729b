from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.hypervisors.embedded.cpu import Cpu, new_cpu
from agents.hypervisors.embedded.errors import StateInvalid
from agents.hypervisors.embedded.ramfile import RamFile
from agents.hypervisors.embedded.registers import Register, load_registers, read_registers
from agents.hypervisors.embedded.spec import CPU_MODELS

u16, u32, u64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
# What a program may set freely; the others have bits that a CPU fixes.
FREE: dict[str, st.SearchStrategy[Register]] = {
    "RAX": u64,
    "R15": u64,
    "RIP": u64,
    "CR2": u64,
    "FS_BASE": u64,
    "GS_BASE": u64,
    "KERNELGSBASE": u64,
    "LSTAR": u64,
    "MXCSR": st.integers(0, 0xFFFF),
    "YMM0": st.binary(min_size=32, max_size=32),
    "YMM15": st.binary(min_size=32, max_size=32),
    "FP3": st.tuples(u64, u16).map(list),
    "GDTR": st.tuples(st.just(0), u64, u16, st.just(0)).map(list),
}


@pytest.fixture(scope="module")
def cpus() -> Iterator[tuple[Cpu, Cpu]]:
    ram = RamFile(1 << 20)
    model = CPU_MODELS["Haswell"]
    yield new_cpu(model, ram.address, ram.ram_bytes), new_cpu(model, ram.address, ram.ram_bytes)
    ram.close()


def with_values(
    registers: list[list[str | Register]], values: dict[str, Register]
) -> list[list[str | Register]]:
    return [[name, values.get(str(name), value)] for name, value in registers]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.fixed_dictionaries(FREE))
def test_what_one_cpu_gives_another_takes_and_gives_again(
    cpus: tuple[Cpu, Cpu], values: dict[str, Register]
) -> None:
    here, there = cpus
    load_registers(here, with_values(read_registers(here), values))
    registers = read_registers(here)
    assert {name: value for name, value in registers if name in values} == values
    load_registers(there, registers)
    assert read_registers(there) == registers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAX", 2**64),
        ("RAX", -1),
        ("RAX", True),
        ("RAX", [1]),
        ("YMM0", b"short"),
        ("YMM0", 5),
        ("FP0", [1, 2**16]),
        ("FP0", 1),
        ("GDTR", [0, 0, 0]),
        ("GDTR", [0, 0, 0, -1]),
        ("EFER", None),
    ],
)
def test_a_value_out_of_range_changes_nothing(cpus: tuple[Cpu, Cpu], name: str, value: Register) -> None:
    here, _ = cpus
    before = read_registers(here)
    with pytest.raises(StateInvalid, match=name):
        load_registers(here, with_values(before, {name: value, "RBX": 77}))
    assert read_registers(here) == before


def test_registers_that_are_missing_or_in_another_order_are_refused(cpus: tuple[Cpu, Cpu]) -> None:
    here, _ = cpus
    registers = read_registers(here)
    for wrong in (
        None,
        registers[:-1],
        registers[::-1],
        [*registers, registers[0]],
        [["RAX"]] * len(registers),
    ):
        with pytest.raises(StateInvalid):
            load_registers(here, wrong)
