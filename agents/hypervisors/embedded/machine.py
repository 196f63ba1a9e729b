"""The machine: a CPU, RAM and devices, run by exact numbers of instructions.

Law: no clock, no thread, no socket. One caller at a time. What a guest computes depends on its spec and on how
many instructions it executed, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgpack

from agents.hypervisors.embedded import program
from agents.hypervisors.embedded.cpu import (
    CpuError,
    new_cpu,
    on_port_in,
    on_port_out,
    on_write,
    register_number,
)
from agents.hypervisors.embedded.devices import Console, Disk, Sectors
from agents.hypervisors.embedded.errors import MachineFault, StateInvalid
from agents.hypervisors.embedded.ramfile import RamFile
from agents.hypervisors.embedded.registers import load_registers, read_registers
from agents.hypervisors.embedded.spec import CPU_MODELS, MAX_STATE_BYTES, EmbeddedSpec

__all__ = ["Machine"]

_VERSION: Final = 1
_RIP: Final = register_number("RIP")
_CR4: Final = register_number("CR4")
_CR4_OSFXSR: Final = 1 << 9
_CR4_OSXMMEXCPT: Final = 1 << 10
_NOWHERE: Final = (1 << 64) - 1
_MAX_COUNT: Final = 1 << 63

# Called with (address, bytes) of each write of the guest and of its devices to RAM.
WriteSeen = Callable[[int, int], None]


class Machine:
    """One machine on RAM and sectors that it does not own. `boot` or `load_state` comes first."""

    def __init__(self, spec: EmbeddedSpec, ram: RamFile, sectors: Sectors) -> None:
        self.spec = spec
        self.instructions = 0
        self.console = Console()
        self.disk = Disk(sectors, ram.view)
        self._ram = ram
        self._hook: int | None = None
        self._write_seen: WriteSeen | None = None
        self._cpu = new_cpu(CPU_MODELS[spec.cpu_model], ram.address, ram.ram_bytes)
        on_port_in(self._cpu, self.disk.port_in)
        on_port_out(self._cpu, self._port_out)

    def boot(self) -> None:
        """Do the firmware's work: content, parameters and program into RAM that is zero, CPU to the start."""
        for address, words in program.fill_pieces(self.spec):
            self._ram.write(address, words.data.cast("B"))
        self._ram.write(program.PARAMETERS_ADDRESS, program.parameters(self.spec))
        self._ram.write(program.CODE_ADDRESS, program.CODE)
        # SSE is off until somebody says that its registers will be kept; the emulator does so for newer models only.
        self._cpu.reg_write(_CR4, self._register(_CR4) | _CR4_OSFXSR | _CR4_OSXMMEXCPT)
        self._cpu.reg_write(_RIP, program.CODE_ADDRESS)

    def run_slice(self, instructions: int) -> int:
        """Execute exactly `instructions`, or fewer at the spec's end; give how many were executed.

        Raises:
            MachineFault: the guest's: its CPU cannot go on.
        """
        if self.spec.max_instructions is not None:
            instructions = min(instructions, self.spec.max_instructions - self.instructions)
        if instructions <= 0:
            return 0
        try:
            self._cpu.emu_start(self._register(_RIP), _NOWHERE, count=instructions)
        except CpuError as exc:
            raise MachineFault(self._register(_RIP), str(exc)) from exc
        self.instructions += instructions
        return instructions

    @property
    def has_ended(self) -> bool:
        """Whether the spec's last instruction was executed."""
        return self.spec.max_instructions is not None and self.instructions >= self.spec.max_instructions

    def counters(self) -> program.Counters:
        """Read what the guest counted, from its RAM."""
        start = program.COUNTERS_ADDRESS
        return program.read_counters(self._ram.view[start : start + program.COUNTERS_BYTES])

    def watch_writes(self, write_seen: WriteSeen | None) -> None:
        """Call `write_seen` for each write to RAM from now on, or with None stop that."""
        if self._hook is not None:
            self._cpu.hook_del(self._hook)
            self._hook = None
        self._write_seen = write_seen
        if write_seen is not None:
            self._hook = on_write(self._cpu, write_seen)
        # Translated code has the hooks of the time when it was translated.
        self._cpu.ctl_flush_tb()

    def save_state(self) -> bytes:
        """Give all that is not RAM; equal machines give equal bytes."""
        packed: bytes = msgpack.packb(
            [
                _VERSION,
                self.spec.cpu_model,
                self.instructions,
                read_registers(self._cpu),
                self.console.state(),
                self.disk.state(),
            ]
        )
        return packed

    def load_state(self, state: bytes) -> None:
        """Take what another machine's `save_state` gave; RAM is there already or comes before it runs.

        Raises:
            StateInvalid: theirs: it is not a state of this kind of machine. Then this machine must not run.
        """
        if len(state) > MAX_STATE_BYTES:
            raise StateInvalid(f"device state of {len(state)} bytes; {MAX_STATE_BYTES} are the most")
        try:
            parts = msgpack.unpackb(state)
        except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as exc:
            raise StateInvalid(f"device state is not msgpack ({type(exc).__name__})") from exc
        if not isinstance(parts, list) or len(parts) != 6 or parts[0] != _VERSION:
            raise StateInvalid(f"device state is not of version {_VERSION}; update the agents on both hosts")
        _, cpu_model, instructions, registers, console, disk = parts
        if cpu_model != self.spec.cpu_model:
            raise StateInvalid(
                f"device state is of a {cpu_model!r:.40} CPU, this one is a {self.spec.cpu_model}"
            )
        if (
            not isinstance(instructions, int)
            or isinstance(instructions, bool)
            or not 0 <= instructions < _MAX_COUNT
        ):
            raise StateInvalid("device state has no count of instructions")
        self.console.load(console)
        self.disk.load(disk)
        load_registers(self._cpu, registers)
        self.instructions = instructions

    def _register(self, number: int) -> int:
        value = self._cpu.reg_read(number)
        return value if isinstance(value, int) else 0

    def _port_out(self, port: int, value: int) -> None:
        if port == Console.PORT:
            self.console.write(value)
            return
        written = self.disk.port_out(port, value)
        if written is not None and self._write_seen is not None:
            self._write_seen(*written)
