"""The full context of the CPU, register by register: out of one emulator and into another.

Law: canonical: machines in equal states give equal lists, whatever happened before. Every register is named, so
that a state can be read by a person and does not depend on the emulator's own layout of a context.

Left out on purpose: the time stamp counter (the emulator takes it from the host; a deterministic guest does not
read it), and AVX-512 (no instruction of this emulator reaches it).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Final

from agents.hypervisors.embedded.cpu import MSR, Cpu, CpuError, RegisterValue, register_number
from agents.hypervisors.embedded.errors import StateInvalid

__all__ = ["Register", "load_registers", "read_registers"]

Register = int | list[int] | bytes

_GENERAL: Final = (
    *(f"R{n}X" for n in "ABCD"),
    "RSI",
    "RDI",
    "RBP",
    "RSP",
    *(f"R{n}" for n in range(8, 16)),
    "RIP",
    "RFLAGS",
)
_CONTROL: Final = ["CR0", "CR2", "CR3", "CR4", "CR8", "DR0", "DR1", "DR2", "DR3", "DR6", "DR7"]
_TABLES: Final = ["GDTR", "IDTR", "LDTR", "TR"]  # selector, base, limit, flags
_SEGMENTS: Final = ["CS", "SS", "DS", "ES", "FS", "GS"]
# Bases after selectors: loading a selector sets its base.
_BASES: Final = ["FS_BASE", "GS_BASE"]
# FPSW before the stack (it has the top of it), FPTAG after (a tag is made from what its register holds).
_X87_BEFORE: Final = ["FPCW", "FPSW", "FIP", "FDP", "FOP", "FCS", "FDS"]
_X87_STACK: Final = tuple(f"FP{n}" for n in range(8))  # mantissa, sign and exponent
_X87_AFTER: Final = ("FPTAG",)
_VECTORS: Final = tuple(
    f"YMM{n}" for n in range(16)
)  # with XMM as their lower halves; 32 bytes, little endian
_SSE: Final = ("MXCSR",)
# EFER first: it decides what the control registers mean.
_MSRS: Final = MappingProxyType(
    {
        "EFER": 0xC0000080,
        "APICBASE": 0x1B,
        "SYSENTER_CS": 0x174,
        "SYSENTER_ESP": 0x175,
        "SYSENTER_EIP": 0x176,
        "PAT": 0x277,
        "STAR": 0xC0000081,
        "LSTAR": 0xC0000082,
        "CSTAR": 0xC0000083,
        "FMASK": 0xC0000084,
        "KERNELGSBASE": 0xC0000102,
        "TSC_AUX": 0xC0000103,
    }
)
_VECTOR_BYTES: Final = 32

_PLAIN: Final = frozenset(
    (*_GENERAL, *_CONTROL, *_SEGMENTS, *_BASES, *_X87_BEFORE, *_X87_AFTER, *_SSE, *_MSRS)
)
# Order of loading, and of the wire form.
_ORDER: Final = (
    *_MSRS,
    *_CONTROL,
    *_TABLES,
    *_SEGMENTS,
    *_BASES,
    *_X87_BEFORE,
    *_X87_STACK,
    *_X87_AFTER,
    *_SSE,
    *_VECTORS,
    *_GENERAL,
)
_NUMBERS: Final = MappingProxyType({name: register_number(name) for name in _ORDER if name not in _MSRS})


def read_registers(cpu: Cpu) -> list[list[str | Register]]:
    """Give [name, value] of every register of a CPU that stands still."""
    return [[name, _read(cpu, name)] for name in _ORDER]


def load_registers(cpu: Cpu, registers: object) -> None:
    """Put what `read_registers` gave into another CPU of the same model.

    Raises:
        StateInvalid: theirs: a register is missing, unknown or out of range, or the CPU refuses it. Then the
            CPU must not run: some registers may have been loaded.
    """
    for name, value in list(_checked(registers)):
        try:
            if name in _MSRS and isinstance(value, int):
                cpu.reg_write(MSR, (_MSRS[name], value))
            else:
                cpu.reg_write(_NUMBERS[name], _to_cpu(value))
        except CpuError as exc:
            raise StateInvalid(f"the CPU does not take register {name}: {exc}") from exc


def _to_cpu(value: Register) -> RegisterValue:
    match value:
        case bytes():
            return int.from_bytes(value, "little")
        case list():
            return tuple(value)
        case int():
            return value


def _read(cpu: Cpu, name: str) -> Register:
    value = cpu.reg_read(MSR, _MSRS[name]) if name in _MSRS else cpu.reg_read(_NUMBERS[name])
    if isinstance(value, tuple):
        return list(value)
    return value.to_bytes(_VECTOR_BYTES, "little") if name in _VECTORS else value


def _checked(registers: object) -> Iterator[tuple[str, Register]]:
    if not isinstance(registers, list) or len(registers) != len(_ORDER):
        raise StateInvalid(f"the CPU's state does not have {len(_ORDER)} registers")
    for name, pair in zip(_ORDER, registers, strict=True):
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] != name:
            raise StateInvalid(f"register {name} is not where it should be in the CPU's state")
        value = pair[1]
        if not _is_in_range(name, value):
            raise StateInvalid(f"register {name} has a value that it cannot have")
        yield name, value


def _is_in_range(name: str, value: object) -> bool:
    if name in _PLAIN:
        return _is_unsigned(value, 64)
    if name in _VECTORS:
        return isinstance(value, bytes) and len(value) == _VECTOR_BYTES
    if not isinstance(value, list):
        return False
    widths = (16, 64, 32, 32) if name in _TABLES else (64, 16)
    return len(value) == len(widths) and all(map(_is_unsigned, value, widths))


def _is_unsigned(value: object, bits: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << bits
