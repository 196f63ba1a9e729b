"""The guest that is moved, started again and again from one saved state; and what is measured of it from outside.

Law: whoever moves it, it is started by the same arguments from the same bytes. Its turns are stamped here, by
the host's clock: a guest's own clock stands still with it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from agents.hypervisors.qemu.cmdline import HostPaths, argv_of
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.spec import Accel, MemorySpec, QemuSpec
from agents.testguest.image import BEAT_MARK, BEAT_OFFSET
from bench.qemu.qmp import Qmp

__all__ = [
    "Beats",
    "Meter",
    "Place",
    "Source",
    "cpu_s",
    "end_qemu",
    "largest_gap_ms",
    "peak_kib",
    "save_guest",
]

LOOK_EVERY_S: Final = 0.001
BOOT_TIMEOUT_S: Final = 120.0
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The directories of one run of the bench."""

    folder: Path
    binary: Path
    accel: Accel

    @property
    def boot(self) -> Path:
        return self.folder / "boot"

    @property
    def state(self) -> Path:
        """The saved guest: QEMU's own migration stream, all RAM in it."""
        return self.folder / "state"

    def qemu_dir(self, host: str) -> Path:
        return self.folder / host / "qemu"

    def paths(self, host: str, guest_id: str) -> QemuPaths:
        return QemuPaths.of_guest(self.qemu_dir(host), guest_id)

    def spec(self, guest_id: str, *, ram_bytes: int, words: str) -> QemuSpec:
        """The machine. Its identity is no part of its state: each run has a new one."""
        return QemuSpec(
            guest_id=guest_id,
            name="bench",
            machine="pc-q35-7.2",
            accel=self.accel,
            cpu="Nehalem",
            vcpus=1,
            memories=(MemorySpec(name="ram0", size_bytes=ram_bytes),),
            kernel=str(self.boot / "vmlinuz"),
            initrd=str(self.boot / "initrd"),
            append=f"console=ttyS0 quiet -- {words}",
        )

    def argv(self, host: str, spec: QemuSpec) -> list[str]:
        """The arguments of this machine on a host."""
        paths = self.paths(host, spec.guest_id)
        return argv_of(
            spec,
            HostPaths(
                binary=self.binary,
                qmp=paths.qmp,
                monitor=paths.monitor,
                console=paths.console,
                console_log=paths.log,
                pid=paths.pid,
            ),
            is_incoming=False,
        )


class Beats:
    """When a guest did something, at one host: its count of turns in its own RAM, looked at every ms by a thread.

    `at_s` are the times of the looks that saw a new count. The RAM is mapped here, so that no console and no network is
    in the way, and the guest's own clock, which stands still with it, is not asked.
    """

    def __init__(self, paths: QemuPaths, offset: int | None = None) -> None:
        self.at_s: list[float] = []
        self.offset = offset
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(paths,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self, paths: QemuPaths) -> None:
        ram = None
        while ram is None and not self._stop.wait(0.005):
            with contextlib.suppress(OSError, ValueError):
                ram = _map_ram(int(paths.pid.read_text()))
        if ram is None:
            return
        seen = b""
        while not self._stop.wait(LOOK_EVERY_S):
            if self.offset is None:
                found = ram.find(BEAT_MARK)
                if found < 0:
                    self._stop.wait(0.2)
                    continue
                self.offset = found + BEAT_OFFSET
            count = ram[self.offset : self.offset + 8]
            if count != seen and any(count):
                seen = count
                self.at_s.append(time.time())


def _map_ram(pid: int) -> mmap.mmap:
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        if "memfd:memory-backend" in os.readlink(f"{folder}/{number}"):
            fd = os.open(f"{folder}/{number}", os.O_RDONLY)
            try:
                return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
    raise ValueError("its RAM is not there yet")


@dataclass
class Source:
    """A guest that runs at host-a from the saved state on."""

    place: Place
    spec: QemuSpec
    process: subprocess.Popen[bytes]
    beats: Beats

    @classmethod
    def start(
        cls, place: Place, prefix: tuple[str, ...], *, ram_bytes: int, words: str, offset: int | None = None
    ) -> Source:
        """Start it and wait until it runs. `offset` is where its count is, if that is known."""
        spec = place.spec(str(uuid.uuid4()), ram_bytes=ram_bytes, words=words)
        paths = place.paths("host-a", spec.guest_id)
        argv = [word for word in place.argv("host-a", spec) if word != "-daemonize"]
        process = subprocess.Popen(
            [*prefix, *argv, "-incoming", f"exec:cat {place.state}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        beats = Beats(paths, offset)
        deadline_s = time.monotonic() + BOOT_TIMEOUT_S
        with Qmp(paths.monitor) as qmp:
            # It was saved standing still, and is loaded so.
            while qmp.ask("query-status")["status"] == "inmigrate":
                time.sleep(0.02)
            qmp.ask("cont")
        while len(beats.at_s) < 50:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the saved guest did not run on")
            time.sleep(0.02)
        return cls(place, spec, process, beats)

    @property
    def pid(self) -> int:
        """QEMU's own process: the first is `ip`, which becomes it."""
        return self.process.pid

    def close(self) -> None:
        self.beats.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.place.paths("host-a", self.spec.guest_id).remove()


def save_guest(place: Place, *, ram_bytes: int, words: str) -> None:
    """Boot the guest once, let it fill its memory, and save all of it."""
    spec = place.spec(str(uuid.uuid4()), ram_bytes=ram_bytes, words=words)
    paths = place.paths("host-a", spec.guest_id)
    subprocess.run(place.argv("host-a", spec), check=True, stdout=subprocess.DEVNULL)
    try:
        beats = Beats(paths)
        deadline_s = time.monotonic() + BOOT_TIMEOUT_S
        while len(beats.at_s) < 500:
            if time.monotonic() > deadline_s:
                raise RuntimeError("the guest did not boot")
            time.sleep(0.1)
        beats.close()
        with Qmp(paths.monitor) as qmp:
            qmp.ask("stop")
            qmp.ask("migrate-set-parameters", {"max-bandwidth": 1 << 40})
            qmp.ask("migrate", {"uri": f"exec:cat > {place.state}"})
            while qmp.ask("query-migrate").get("status") not in ("completed", "failed"):
                time.sleep(0.05)
            qmp.ask("quit")
    finally:
        end_qemu(paths)


def largest_gap_ms(beats_s: list[float], began_s: float, ended_s: float) -> float:
    """Give the longest silence between heartbeats of a stretch of time."""
    within = [began_s, *(at for at in beats_s if began_s <= at <= ended_s)]
    return max(((later - earlier) * 1e3 for earlier, later in pairwise(within)), default=0.0)


def end_qemu(paths: QemuPaths) -> None:
    """Kill a QEMU by its pid file, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(paths.pid.read_text()), 9)
    paths.remove()


@dataclass
class Meter:
    """CPU seconds and memory of processes, sampled until they end: what a process had last is what it had."""

    pids: dict[str, int]
    _first_s: dict[str, float] = field(default_factory=dict)
    _last_s: dict[str, float] = field(default_factory=dict)
    _peak_kib: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Meter:
        for name, pid in self.pids.items():
            self._first_s[name] = cpu_s(pid)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """What comes from now on does not count. May be called twice."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._look()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, name: str, pid: int) -> None:
        """A process that was started meanwhile: all of its CPU counts."""
        self._first_s[name] = 0.0
        self.pids = {**self.pids, name: pid}

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes together, their children included."""
        return sum(self._last_s.get(name, first) - first for name, first in self._first_s.items())

    @property
    def peak_mib(self) -> float:
        """The most memory of their own that all had, each at its peak."""
        return sum(self._peak_kib.values()) / 1024

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self._look()

    def _look(self) -> None:
        for name, pid in list(self.pids.items()):
            with contextlib.suppress(OSError, ValueError, IndexError):
                self._last_s[name] = cpu_s(pid)
                self._peak_kib[name] = max(self._peak_kib.get(name, 0), peak_kib(pid))


def cpu_s(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return sum(int(words[at]) for at in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")


def peak_kib(pid: int) -> int:
    """Memory that is a process's own: neither guest RAM nor libraries."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return 0
