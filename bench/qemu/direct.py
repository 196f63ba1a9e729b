"""vmferry moves the guest: two agents, each in its host's network.

Law: what a person would run and nothing else: agents from configurations, and the client that jobs use.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import anyio

from agents import pki
from agents.client import Fleet
from agents.config import ClientSettings, Endpoint, TlsSettings
from agents.errors import AgentError
from bench.qemu.figures import Figures
from bench.qemu.links import Link
from bench.qemu.native import DOWNTIME_LIMIT_MS, SETTLE_S
from bench.qemu.qmp import Qmp, stamp_s
from bench.qemu.source import Beats, Meter, Place, Source, end_qemu
from migrate.errors import MigrationError
from migrate.stats import Report

__all__ = ["Agents", "move", "running_agents"]

HOSTS: Final = ("host-a", "host-b")
# Below the range that the kernel takes for connections.
CONTROL_PORT: Final = 27200
REPOSITORY: Final = Path(__file__).resolve().parents[2]
START_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agents:
    """Two agents that serve."""

    fleet: Fleet
    pids: dict[str, int]


@contextlib.contextmanager
def running_agents(place: Place, link: Link) -> Iterator[Agents]:
    """Run both agents for as long as the block lasts."""
    certificates = place.folder / "pki"
    if not certificates.exists():
        pki.init_ca(certificates, "vmferry bench")
        for host in HOSTS:
            pki.issue(certificates, pki.Role.AGENT, host)
        pki.issue(certificates, pki.Role.OPERATOR, "bench")
    endpoints = {
        host: Endpoint(address, CONTROL_PORT + 10 * number)
        for number, (host, address) in enumerate(zip(HOSTS, link.addresses, strict=True))
    }
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for number, host in enumerate(HOSTS):
            config = place.folder / f"{host}-{link.name}.toml"
            config.write_text(_config(place, host, endpoints))
            log = place.folder / f"{host}-{link.name}.log"
            with log.open("wb") as words:
                command = [sys.executable, "-m", "agents.cli", "agent", "run", "--config", str(config)]
                processes[host] = subprocess.Popen(
                    [*link.prefixes[number], *command],
                    cwd=REPOSITORY,
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                )
            _await_listening(processes[host], log)
        settings = ClientSettings(
            tls=TlsSettings(
                ca=certificates / "ca.crt",
                certificate=certificates / "operator-bench.crt",
                key=certificates / "operator-bench.key",
            ),
            hosts=MappingProxyType(endpoints),
        )
        yield Agents(fleet=Fleet(settings), pids={host: one.pid for host, one in processes.items()})
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def move(source: Source, link: Link, agents: Agents, timeout_s: float) -> Figures:
    """Move a running guest; give what it took. It ends on both hosts."""
    place, spec = source.place, source.spec
    there = place.paths("host-b", spec.guest_id)
    wire_before = link.wire_bytes()
    seen: dict[str, float] = {}
    with Meter({"source": source.pid, **agents.pids}) as meter, _Stop(source) as stop:
        began_s = time.time()
        beats = Beats(there, source.beats.offset)
        watcher = threading.Thread(
            target=_watch_arrival, args=(place, spec.guest_id, meter, seen), daemon=True
        )
        watcher.start()

        async def run() -> Report:
            return await agents.fleet.move(
                spec.guest_id,
                "host-b",
                downtime_limit_s=DOWNTIME_LIMIT_MS / 1e3,
                timeout_s=timeout_s,
                # The audit is a proof, and no part of a migration that is timed against another.
                audit=False,
            )

        try:
            anyio.run(run)
            meter.stop()
            wire_bytes = link.wire_bytes() - wire_before
            watcher.join(10)
            time.sleep(SETTLE_S)
        except (AgentError, MigrationError):
            return Figures.endless(timeout_s)
        finally:
            beats.close()
            end_qemu(there)
        stopped_s = stop.at_s()
    return Figures.of(
        began_s=began_s,
        stopped_s=stopped_s,
        resumed_s=seen["resumed"],
        wire_bytes=wire_bytes,
        meter=meter,
        here=source.beats,
        there=beats,
    )


class _Stop:
    """When the source's QEMU stops: its second monitor hears of it, as the agent's does."""

    def __init__(self, source: Source) -> None:
        self._path = source.place.paths("host-a", source.spec.guest_id).monitor

    def __enter__(self) -> _Stop:
        self._qmp = Qmp(self._path)
        self._qmp.events.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._qmp.close()

    def at_s(self) -> float:
        return stamp_s(self._qmp.wait_event("STOP", 10))


def _watch_arrival(place: Place, guest_id: str, meter: Meter, seen: dict[str, float]) -> None:
    """Note when the destination's QEMU lets the guest run, and let its CPU count."""
    paths = place.paths("host-b", guest_id)
    with contextlib.suppress(OSError, RuntimeError, TimeoutError), Qmp(paths.monitor, 600.0) as qmp:
        meter.add("destination", int(paths.pid.read_text()))
        seen["resumed"] = stamp_s(qmp.wait_event("RESUME", 600.0))


def _config(place: Place, host: str, endpoints: dict[str, Endpoint]) -> str:
    own = endpoints[host]
    peers = "".join(
        f'[peers.{name}]\naddress = "{endpoint}"\n' for name, endpoint in endpoints.items() if name != host
    )
    return f"""
[agent]
name = "{host}"
listen = "{own}"
data_listen = "{own.host}:{own.port + 1}"
metrics_listen = "127.0.0.1:{own.port + 2}"
state_dir = "{host}/state"
[tls]
ca = "pki/ca.crt"
certificate = "pki/agent-{host}.crt"
key = "pki/agent-{host}.key"
{peers}
[[allow]]
operators = ["*"]
may = ["view", "move", "resolve"]
[[allow]]
agents = ["*"]
may = ["send-guests"]
[storage]
shared_dirs = ["shared"]
[guests.qemu]
dir = "{host}/qemu"
binary = "{place.binary}"
accels = ["{place.accel}"]
kernel_dirs = ["boot"]
"""


def _await_listening(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while b"agent listening" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"an agent did not start: {log.read_text(errors='replace')[-500:]}")
        time.sleep(0.02)
