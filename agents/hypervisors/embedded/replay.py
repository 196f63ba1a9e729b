"""The same guest, never moved: run from boot to an instruction count, in this process.

Law: touches nothing outside: its disk forgets. Blocking; call it from a worker thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from agents.hypervisors.embedded.devices import MemorySectors, NoSectors, Sectors
from agents.hypervisors.embedded.fingerprint import ram_fingerprint
from agents.hypervisors.embedded.machine import Machine
from agents.hypervisors.embedded.ramfile import RamFile
from agents.hypervisors.embedded.spec import EmbeddedSpec

__all__ = ["replay"]

# About a quarter of a second, so that the process stays responsive to signals.
_SLICE_INSTRUCTIONS: Final = 8_000_000


def replay(
    spec: EmbeddedSpec,
    instructions: int,
    *,
    sectors: Sectors | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[bytes, bytes]:
    """Run `spec` from boot to exactly `instructions`; give the fingerprint of its RAM and its device state.

    Both equal what the guest's process gives (`fingerprint`, `save_state`) for a guest paused at that count,
    however often it was moved on the way. `sectors` are its disk instead of one that is empty and forgets; they
    stay the caller's. `on_progress` hears, some times a second, how many instructions are done, and may raise to
    end the replay.

    Raises:
        MachineFault: the guest's program cannot go on.
        GuestGone: the world's: no memory for another guest of this size.
    """
    ram = RamFile(spec.ram_bytes)
    if sectors is None:
        sectors = MemorySectors() if spec.disk_path is not None else NoSectors()
    try:
        machine = Machine(spec, ram, sectors)
        machine.boot()
        while machine.instructions < instructions:
            if not machine.run_slice(min(_SLICE_INSTRUCTIONS, instructions - machine.instructions)):
                break
            if on_progress is not None:
                on_progress(machine.instructions)
        return ram_fingerprint(ram.fd, ram.ram_bytes), machine.save_state()
    finally:
        ram.close()
