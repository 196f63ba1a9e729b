"""Roots of hosts that are not this one: real directories with what the kernel would show, and machines in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agents.hypervisors.inhabitants import Inhabitant

MEMINFO = """\
MemTotal:        8388608 kB
MemFree:          100000 kB
MemAvailable:    4000000 kB
SwapTotal:       2097152 kB
SwapFree:        1048576 kB
HugePages_Total:       0
"""
PRESSURE = (
    "some avg10=9.00 avg60={avg60} avg300=1.00 total=123\nfull avg10=0.00 avg60=77.00 avg300=0.00 total=0\n"
)


@dataclass
class Root:
    """Files below a folder."""

    folder: Path

    def write(self, path: str, content: str | bytes) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file


@dataclass
class Tenants:
    """A driver whose machines the test names."""

    machines: tuple[Inhabitant, ...] = ()
    questions: int = 0

    async def inhabitants(self) -> tuple[Inhabitant, ...]:
        self.questions += 1
        return self.machines


def machine(guest_id: str, ram_bytes: int = 1 << 30, vcpus: int = 2, pid: int = 1) -> Inhabitant:
    return Inhabitant(guest_id=guest_id, ram_bytes=ram_bytes, vcpus=vcpus, pid=pid)


def host(folder: Path) -> Root:
    """A host with 8 GiB, half of its 2 GiB of swap used, and 6 CPUs online."""
    root = Root(folder)
    root.write("proc/meminfo", MEMINFO)
    root.write("proc/loadavg", "1.50 2.25 3.00 4/127 9896\n")
    root.write("proc/pressure/memory", PRESSURE.format(avg60="12.50"))
    root.write("proc/pressure/cpu", PRESSURE.format(avg60="0.00"))
    root.write("proc/self/cgroup", "0::/agents/vmferry\n")
    root.write("sys/devices/system/cpu/online", "0-3,8,10\n")
    return root
