"""Agents as processes of their own, to be killed without warning and started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from agents.errors import JournalCorrupt
from agents.journal import read_journal
from migrate.errors import JournalFailed
from tests.agents.host.fleet import HOSTS, Fleet, free_port
from tests.waiting import delay_blocking, until_blocking

START_TIMEOUT_S = 20.0
PROGRAM = ("-m", "agents.cli")
REPOSITORY = Path(__file__).parents[3]


@dataclass
class Processes:
    """The agents of a fleet by host. Every method blocks: call from a worker thread."""

    fleet: Fleet
    configs: dict[str, Path]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    # What each agent's command begins with: `ip netns exec ...` where it has a network of its own.
    prefixes: dict[str, list[str]] = field(default_factory=dict)
    # What python runs as the agent, where that is not the agent alone.
    programs: dict[str, list[str]] = field(default_factory=dict)

    def log_path(self, host: str) -> Path:
        return self.fleet.folder / f"{host}.jsonl"

    def lines(self, host: str) -> list[dict[str, object]]:
        """What an agent has logged, over all its lives; the last line only when it is whole."""
        text = self.log_path(host).read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def await_line(self, host: str, words: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until an agent has logged a line with these words."""
        until_blocking(
            lambda: any(words in str(line) for line in self.lines(host)),
            lambda: f"{words!r} in the log of {host}: {self.log_path(host).read_text()}",
            within_s=timeout_s,
        )

    def start(self, *hosts: str) -> None:
        """Start agents, in this order and all at once; they serve when this returns."""
        seen = {host: len(self.lines(host)) if self.log_path(host).exists() else 0 for host in hosts}
        for host in hosts:
            with self.log_path(host).open("ab") as log:
                self.running[host] = subprocess.Popen(
                    [
                        *self.prefixes.get(host, ()),
                        *(sys.executable, *self.programs.get(host, PROGRAM)),
                        *("agent", "run", "--config", self.configs[host]),
                    ],
                    cwd=REPOSITORY,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        for host in hosts:
            self._await_listening(host, seen[host])

    def _await_listening(self, host: str, seen: int) -> None:
        def serves() -> bool:
            if self.running[host].poll() is not None:
                raise AssertionError(self.log_path(host).read_text())
            for line in self.lines(host)[seen:]:
                if line["event"] == "agent listening":
                    self.fleet.control_ports[host] = int(str(line["control"]))
                    self.fleet.data_ports[host] = int(str(line["data"]))
                    self.fleet.metrics_ports[host] = int(str(line["metrics"]))
                    return True
            return False

        until_blocking(serves, lambda: self.log_path(host).read_text(), within_s=START_TIMEOUT_S)

    def signal(self, host: str, number: signal.Signals) -> None:
        self.running[host].send_signal(number)

    def kill(self, *hosts: str) -> None:
        """SIGKILL them, all before the first is waited for."""
        for host in hosts:
            self.running[host].kill()
        for host in hosts:
            self.running.pop(host).wait()

    def kill_at(self, host: str, step: str, after_s: float) -> None:
        """Kill both `after_s` after this host's journal has that step."""
        is_there = threading.Event()
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_there.is_set() and time.monotonic() < deadline_s:
            for folder in ("journal", "history"):
                for path in (self.fleet.state_dir(host) / folder).glob("*.log"):
                    if step in _steps(path):
                        is_there.set()
        if not is_there.is_set():
            raise AssertionError(f"{host} never came to {step}")
        delay_blocking(after_s)
        self.kill(*HOSTS)

    def end(self) -> None:
        """End all at once; an agent that does not end, or not well, is a failure."""
        for process in self.running.values():
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        codes: dict[str, int | None] = {}
        for host, process in self.running.items():
            try:
                codes[host] = process.wait(3)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # of a test that failed: no need to let its moves finish
                try:
                    codes[host] = process.wait(20)
                except subprocess.TimeoutExpired:
                    codes[host] = None
                    process.kill()
                    process.wait()
        for host, code in codes.items():
            if code != 0:
                raise AssertionError(f"{host} ended with {code}: {self.log_path(host).read_text()}")


@contextmanager
def running_processes(
    folder: Path,
    event_loop: str,
    limits: str,
    qemu: str = "",
    storage: str = "",
    fronts: Mapping[str, str] = MappingProxyType({}),
    prefixes: Mapping[str, list[str]] = MappingProxyType({}),
) -> Iterator[Processes]:
    """Two agents that know each other, by `fronts` where a network lies before them; both end with the block."""
    fleet = Fleet(folder, fronts=dict(fronts))
    fleet.issue()
    ports = {host: free_port() for host in HOSTS}
    configs = {
        host: fleet.write_config(
            host, ports, limits=limits, event_loop=event_loop, qemu=qemu, storage=storage
        )
        for host in HOSTS
    }
    processes = Processes(fleet, configs, prefixes=dict(prefixes))
    try:
        processes.start(*HOSTS)
        yield processes
    finally:
        processes.end()


def _steps(path: Path) -> list[str]:
    try:
        return [entry.step for entry in read_journal(path)]
    except (JournalFailed, JournalCorrupt):
        return []  # it is being moved to the history
