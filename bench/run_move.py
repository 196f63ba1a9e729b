"""How fast does a running guest move, and how long does it stand still?

Two agent processes on this machine and an embedded guest of 1 GiB of which half is not zero and compressible; no
cap. The guest goes back and forth; the first move is not counted (memory that the machine itself has never
touched).
"""

from __future__ import annotations

import statistics
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents.client import Fleet
from agents.config import Endpoint, EventLoop
from agents.demo.embedded import end_embedded_guests
from agents.demo.scratch import HOSTS, Agents, Scratch, open_scratch, running_agents
from agents.hypervisors.embedded.client import start_guest
from agents.hypervisors.embedded.spec import Content, EmbeddedSpec, Pattern
from migrate.source_ports import DELTA_CACHE_BYTES
from migrate.stats import Report

QUESTION: Final = "How fast does a running guest of 1 GiB move on loopback, and how long does it stand still?"

GOAL_BYTES_PER_S: Final = 1e9
GOAL_DOWNTIME_MS: Final = {20: 10.0, 200: 30.0}
GOAL_LATENESS_MS: Final = 20.0
# An agent, one migration, and the cache of it that is configured.
GOAL_OWN_MIB: Final = 64 + 8 + DELTA_CACHE_BYTES / (1 << 20)

MIB: Final = 1 << 20
SAMPLE_S: Final = 0.02
LATENESS: Final = "vmferry_loop_lateness_seconds_bucket"


@dataclass(slots=True)
class _Seen:
    """What was measured at one rate of writing."""

    reports: list[Report] = field(default_factory=list)

    def downtimes_ms(self) -> list[float]:
        return [report.downtime.total_s * 1e3 for report in self.reports if report.downtime]

    def speeds(self) -> list[float]:
        """Guest RAM per second, from the first page until the guest ran at the destination."""
        return [
            report.ram_bytes / (sum(r.duration_s for r in report.rounds) + report.downtime.total_s)
            for report in self.reports
            if report.downtime
        ]


def run(smoke: bool) -> dict[str, object]:
    """Give medians; the ratios are figure over goal, so that above 1 is better only for `speed`."""
    return anyio.run(_run, 64 * MIB if smoke else 1024 * MIB, 1 if smoke else 9)


async def _run(ram_bytes: int, moves: int) -> dict[str, object]:
    seen = {rate: _Seen() for rate in GOAL_DOWNTIME_MS}
    with open_scratch(keep=False) as scratch:
        try:
            async with running_agents(scratch, event_loop=EventLoop.ASYNCIO, with_cutter=False) as agents:
                idle_mib = _own_mib(agents)
                own_mib = idle_mib
                for rate, one in seen.items():
                    own_mib = max(own_mib, await _measure(scratch, agents, ram_bytes, rate, moves, one))
                lateness_ms = max(_p99_ms(endpoint) for endpoint in agents.metrics.values())
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(end_embedded_guests, scratch)
    return _figures(ram_bytes, moves, seen, idle_mib, own_mib, lateness_ms)


async def _measure(
    scratch: Scratch, agents: Agents, ram_bytes: int, rate_mib_per_s: int, moves: int, seen: _Seen
) -> float:
    """Move a guest there and back; give the most memory of its own that an agent had meanwhile."""
    fleet = Fleet(agents.settings)
    spec = EmbeddedSpec(
        guest_id=str(uuid.uuid4()),
        name=f"writes-{rate_mib_per_s}",
        ram_bytes=ram_bytes,
        pattern=Pattern.HOT,
        dirty_bytes_per_s=rate_mib_per_s * MIB,
        working_set_bytes=ram_bytes // 4,
        content=Content.COMPRESSIBLE,
        fill_bytes=ram_bytes // 2,
    )
    await anyio.to_thread.run_sync(start_guest, spec, scratch.guests_dir(HOSTS[0]))
    own_mib = 0.0

    async def sample() -> None:
        nonlocal own_mib
        while True:
            own_mib = max(own_mib, _own_mib(agents))
            await anyio.sleep(SAMPLE_S)

    async with anyio.create_task_group() as beside:
        beside.start_soon(sample)
        for number in range(moves + 1):
            report = await fleet.move(spec.guest_id, HOSTS[(number + 1) % 2])
            if number or moves == 1:
                seen.reports.append(report)
        beside.cancel_scope.cancel()
    return own_mib


def _figures(
    ram_bytes: int,
    moves: int,
    seen: dict[int, _Seen],
    idle_mib: float,
    own_mib: float,
    lateness_ms: float,
) -> dict[str, object]:
    speed = statistics.median(seen[20].speeds())
    figures: dict[str, object] = {
        "moves_per_rate": moves,
        "ram_bytes": ram_bytes,
        "speed_bytes_per_s": speed,
        "speed_of_goal_ratio": speed / GOAL_BYTES_PER_S,
        "total_with_set_up_s": statistics.median(report.total_s for report in seen[20].reports),
        "first_round_s": statistics.median(report.rounds[0].duration_s for report in seen[20].reports),
    }
    for rate, goal_ms in GOAL_DOWNTIME_MS.items():
        downtimes_ms = seen[rate].downtimes_ms()
        name = f"downtime_at_{rate}_mib_per_s"
        figures[f"{name}_ms"] = statistics.median(downtimes_ms)
        figures[f"{name}_worst_ms"] = max(downtimes_ms)
        figures[f"{name}_of_goal_ratio"] = statistics.median(downtimes_ms) / goal_ms
        for part in ("pause_s", "last_pages_s", "device_state_s", "load_s", "resume_s"):
            parts_s = [getattr(r.downtime, part) for r in seen[rate].reports if r.downtime]
            figures[f"{name}_{part.removesuffix('_s')}_ms"] = statistics.median(parts_s) * 1e3
    figures["all_digests_equal"] = all(
        report.source_digest == report.destination_digest for one in seen.values() for report in one.reports
    )
    figures["agent_own_idle_mib"] = idle_mib
    figures["agent_own_peak_mib"] = own_mib
    figures["agent_own_of_goal_ratio"] = own_mib / GOAL_OWN_MIB
    figures["loop_lateness_p99_ms"] = lateness_ms
    figures["loop_lateness_of_goal_ratio"] = lateness_ms / GOAL_LATENESS_MS
    return figures


def _own_mib(agents: Agents) -> float:
    """Memory of the larger agent beyond mapped guest RAM: what is private to the process (RssAnon)."""
    return max(_status_kib(pid, "RssAnon") for pid in agents.pids.values()) / 1024


def _status_kib(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    return 0


def _p99_ms(metrics: Endpoint) -> float:
    """The upper edge of the bucket that the 99th percentile of the loop's lateness falls into."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    buckets = [
        (float(line.split('le="')[1].split('"')[0]), float(line.rsplit(" ", 1)[1]))
        for line in lines
        if line.startswith(LATENESS)
    ]
    total = buckets[-1][1]
    return next(edge for edge, count in buckets if count >= 0.99 * total) * 1e3
