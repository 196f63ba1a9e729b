"""The emulated CPU: the one place that knows the `unicorn` package, as a typed surface of what we use of it.

Law: no meaning in here, only types: the package has no usable annotations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from unicorn import (  # type: ignore[attr-defined]  # re-exported by a star, which mypy does not accept
    UC_ARCH_X86,
    UC_HOOK_INSN,
    UC_HOOK_MEM_WRITE,
    UC_MODE_64,
    UC_PROT_ALL,
    Uc,
    UcError,
    x86_const,
)

__all__ = [
    "MSR",
    "Cpu",
    "CpuError",
    "RegisterValue",
    "new_cpu",
    "on_port_in",
    "on_port_out",
    "on_write",
    "register_number",
]

RegisterValue = int | tuple[int, ...]
CpuError: type[Exception] = UcError
MSR: int = x86_const.UC_X86_REG_MSR


class Cpu(Protocol):
    """What we use of `unicorn.Uc`. Every call may raise CpuError."""

    def emu_start(self, begin: int, until: int, timeout: int = 0, count: int = 0) -> None: ...
    def reg_read(self, reg_id: int, aux: int | None = None) -> RegisterValue: ...
    def reg_write(self, reg_id: int, value: RegisterValue) -> None: ...
    def mem_map_ptr(self, address: int, size: int, perms: int, ptr: int) -> None: ...
    def hook_add(
        self,
        htype: int,
        callback: Callable[..., object],
        user_data: object = None,
        begin: int = 1,
        end: int = 0,
        aux1: int = 0,
    ) -> int: ...
    def hook_del(self, handle: int) -> None: ...
    def ctl_flush_tb(self) -> None: ...


_make = cast(Callable[[int, int, int], Cpu], Uc)


def new_cpu(model: int, ram_address: int, ram_bytes: int) -> Cpu:
    """Make a CPU in 64-bit mode with `ram_bytes` at guest address 0, which are ours at `ram_address`."""
    cpu = _make(UC_ARCH_X86, UC_MODE_64, model)
    cpu.mem_map_ptr(0, ram_bytes, UC_PROT_ALL, ram_address)
    return cpu


def register_number(name: str) -> int:
    """Give the package's number of a register that it names `name`."""
    return cast(int, getattr(x86_const, f"UC_X86_REG_{name}"))


def on_port_in(cpu: Cpu, answer: Callable[[int], int]) -> None:
    """Let `answer(port)` give what an IN instruction reads."""
    # (1, 0) is unicorn's way to say "everywhere".
    cpu.hook_add(
        UC_HOOK_INSN, lambda _uc, port, _size, _data: answer(port), None, 1, 0, x86_const.UC_X86_INS_IN
    )


def on_port_out(cpu: Cpu, take: Callable[[int, int], None]) -> None:
    """Let `take(port, value)` see each OUT instruction."""
    cpu.hook_add(
        UC_HOOK_INSN,
        lambda _uc, port, _size, value, _data: take(port, value),
        None,
        1,
        0,
        x86_const.UC_X86_INS_OUT,
    )


def on_write(cpu: Cpu, see: Callable[[int, int], None]) -> int:
    """Let `see(address, bytes)` see each store of the CPU; give the handle for `hook_del`.

    About 1 us per store.
    """
    return cpu.hook_add(
        UC_HOOK_MEM_WRITE, lambda _uc, _access, address, size, _value, _data: see(address, size)
    )
