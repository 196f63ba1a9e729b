"""Room on this host: memory, CPUs, what is promised to guests already, and migrations.

Law: reads files below `root` in a worker thread and asks drivers; judges nothing. A file that is not there, or says
something else than it should, is a fact that is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import anyio.to_thread

from agents.config import LimitSettings
from agents.hypervisors.confinement import ROOT
from agents.hypervisors.hostmemory import memory_limits
from agents.hypervisors.inhabitants import Inhabitant, Inhabited
from agents.kernelfiles import text_of
from migrate.facts import CapacityFacts, MoveSlots

__all__ = ["CapacitySurveyor"]


class CapacitySurveyor:
    """Looks at the room on this host."""

    def __init__(
        self,
        limits: LimitSettings,
        drivers: Sequence[Inhabited],
        moves: Callable[[str], MoveSlots],
        *,
        root: Path = ROOT,
    ) -> None:
        """`moves` gives the migrations of this agent, besides those of a guest."""
        self._limits = limits
        self._drivers = drivers
        self._moves = moves
        self._root = root

    async def survey(self, guest_id: str) -> CapacityFacts:
        """Give what there is, and what is promised to other guests than this one."""
        moves = self._moves(guest_id)
        others: list[Inhabitant] | None = None
        if not moves.is_leaving:
            # The preflight before the switchover needs no word of the guests that stay at the source.
            others = [
                one
                for driver in self._drivers
                for one in await driver.inhabitants()
                if one.guest_id != guest_id
            ]
        memory, cpus, load, memory_pressure, cpu_pressure = await anyio.to_thread.run_sync(self._read)
        return CapacityFacts(
            physical_bytes=memory.get("MemTotal"),
            swap_bytes=memory.get("SwapTotal"),
            swap_free_bytes=memory.get("SwapFree"),
            online_cpus=cpus,
            load_5min=load,
            memory_pressure=memory_pressure,
            cpu_pressure=cpu_pressure,
            promised_bytes=None if others is None else sum(one.ram_bytes for one in others),
            promised_vcpus=None if others is None else sum(one.vcpus for one in others),
            memory_overcommit=self._limits.memory_overcommit,
            cpu_overcommit=self._limits.cpu_overcommit,
            moves=moves,
        )

    def _read(self) -> tuple[dict[str, int], int | None, float | None, float | None, float | None]:
        root = self._root
        memory = _memory_of(_ascii(root / "proc/meminfo"))
        limits = memory_limits(root / "proc/self/cgroup", root / "sys/fs/cgroup")
        if "MemTotal" in memory and limits:
            # Guests live in the agent's group: what it may not have is none of theirs.
            memory["MemTotal"] = min(memory["MemTotal"], *limits)
        return (
            memory,
            _cpus_of(_ascii(root / "sys/devices/system/cpu/online")),
            _load_of(_ascii(root / "proc/loadavg")),
            _pressure_of(_ascii(root / "proc/pressure/memory")),
            _pressure_of(_ascii(root / "proc/pressure/cpu")),
        )


def _memory_of(meminfo: str) -> dict[str, int]:
    found = {}
    for line in meminfo.splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[key] = int(words[0]) << 10
    return found


def _cpus_of(online: str) -> int | None:
    """Count a list of the kernel's: `0-3,8`."""
    cpus = 0
    for part in online.strip().split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            return None
        cpus += int(last or first) - int(first) + 1
    return cpus if cpus > 0 else None


def _load_of(loadavg: str) -> float | None:
    words = loadavg.split()
    return _number(words[1]) if len(words) > 1 else None


def _pressure_of(pressure: str) -> float | None:
    """Give avg60 of the line `some`. Source: Linux Documentation/accounting/psi.rst."""
    for line in pressure.splitlines():
        if line.startswith("some "):
            for word in line.split():
                key, _, value = word.partition("=")
                if key == "avg60":
                    return _number(value)
    return None


def _number(word: str) -> float | None:
    return float(word) if word.replace(".", "", 1).isdecimal() else None


def _ascii(path: Path) -> str:
    return text_of(path, encoding="ascii")
