"""The other end of a storage proof, in a process of its own: with mounts, a user and a configuration of its own.

Reads a pickled `Asked` on standard input, writes the pickled readings on standard output.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from agents.storage import SharedDirs
from migrate.preflight import Probe, Reading

__all__ = ["Asked", "Ends"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the other end is asked: `user` is who it is."""

    probes: tuple[Probe, ...]
    shared: tuple[Path, ...]
    devices: tuple[str, ...] = ()
    user: int = 0


@dataclass(slots=True, kw_only=True)
class Ends:
    """Where both ends of one test find disks. `mounts` is shell for the other's namespace of mounts."""

    shared: Path
    devices: tuple[str, ...] = ()
    mounts: str = ""
    user: int = 0
    other_devices: tuple[str, ...] | None = field(default=None)

    async def read_at_the_other(self, probes: tuple[Probe, ...]) -> tuple[Reading, ...]:
        """Have the other end answer for probes of this one."""
        devices = self.devices if self.other_devices is None else self.other_devices
        asked = Asked(probes=probes, shared=(self.shared,), devices=devices, user=self.user)
        command = ["unshare", "-m", "--propagation", "private", "sh", "-ec"] if self.mounts else ["sh", "-ec"]
        done = await anyio.run_process(
            [*command, f"{self.mounts or ':'}\nexec {sys.executable} -m {__name__}"],
            input=pickle.dumps(asked),
            stderr=None,
        )
        readings = pickle.loads(done.stdout)
        if not isinstance(readings, tuple):
            raise TypeError(readings)
        return readings


async def _use_a_thread() -> None:
    await anyio.to_thread.run_sync(lambda: None)


def main() -> None:
    """Answer once."""
    asked = pickle.loads(sys.stdin.buffer.read())
    # What is imported late is root's alone where Python is in root's home.
    anyio.run(_use_a_thread)
    if asked.user:
        os.setgroups([])
        os.setgid(asked.user)
        os.setuid(asked.user)

    async def ask() -> tuple[Reading, ...]:
        return await SharedDirs(asked.shared, shared_devices=asked.devices).read_probes(asked.probes)

    sys.stdout.buffer.write(pickle.dumps(anyio.run(ask)))


if __name__ == "__main__":
    # Pickled values name this module by its own name, not as the program that runs.
    from tests.agents.storageproof.other_end import main as run

    run()
