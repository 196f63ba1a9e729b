"""Does a guest notice that its writes are watched?

A QEMU guest that counts its turns, one a ms; the dirty log is taken, read 10 times a second and given back; and it is
probed as `vmferry check --predict` does it. Nothing is copied. What is compared is the largest silence of the guest
with the one of the same guest left alone, in turns.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents.demo.errors import NoQemu
from agents.demo.qemu import best_accel, find_qemu
from agents.hypervisors.qemu.describe import block_places, vcpu_threads
from agents.hypervisors.qemu.processmap import places_of
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.tracking import QemuTracker
from agents.testguest.image import KernelMissing, find_kernel
from bench.qemu.place import furnish
from bench.qemu.source import Place, Source, largest_gap_ms, save_guest
from migrate.forecast import PROBE_S
from migrate.probing import watch_writes

QUESTION: Final = "Does a guest notice that its writes are watched?"

RAM_BYTES: Final = 512 << 20
WORDS: Final = "set=64 rate=50"
WATCH_S: Final = 3.0
EVERY_S: Final = 0.1
TURNS: Final = 5
GOAL_MS: Final = 20.0


def run(smoke: bool) -> dict[str, object]:
    """Give the largest silences, alone and watched."""
    try:
        binary, kernel = find_qemu(), find_kernel()
    except (NoQemu, KernelMissing) as exc:
        return {"skipped": str(exc)}
    folder = Path(tempfile.mkdtemp(prefix="vmf-bench-"))
    try:
        place = Place(folder=folder, binary=binary, accel=best_accel())
        furnish(place, kernel)
        save_guest(place, ram_bytes=RAM_BYTES, words=WORDS)
        source = Source.start(place, (), ram_bytes=RAM_BYTES, words=WORDS)
        try:
            return anyio.run(_compare, source, 1 if smoke else TURNS)
        finally:
            source.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _compare(source: Source, turns: int) -> dict[str, object]:
    alone_ms: list[float] = []
    attach_ms: list[float] = []
    watched_ms: list[float] = []
    probed_ms: list[float] = []
    spec = source.spec
    qmp = await Qmp.connect(source.place.paths("host-a", spec.guest_id).monitor)
    try:
        place = places_of(source.pid, await block_places(qmp, spec))[0]
        threads = await vcpu_threads(qmp)
    finally:
        await qmp.aclose()
    for _ in range(turns):
        began_s = time.time()
        await anyio.sleep(WATCH_S)
        alone_ms.append(largest_gap_ms(source.beats.at_s, began_s, time.time()))
        tracker = QemuTracker(source.pid, threads, place.areas(0), lambda harvest: harvest())
        began_s = time.time()
        await anyio.to_thread.run_sync(tracker.start)
        await anyio.sleep(0.1)
        attach_ms.append(largest_gap_ms(source.beats.at_s, began_s, time.time()))
        began_s = time.time()
        while time.time() < began_s + WATCH_S:
            await anyio.sleep(EVERY_S)
            await anyio.to_thread.run_sync(tracker.harvest)
        watched_ms.append(largest_gap_ms(source.beats.at_s, began_s, time.time()))
        await anyio.to_thread.run_sync(tracker.stop)
        await anyio.sleep(0.2)
        began_s = time.time()
        await watch_writes(
            QemuTracker(source.pid, threads, place.areas(0), lambda harvest: harvest()), PROBE_S
        )
        probed_ms.append(largest_gap_ms(source.beats.at_s, began_s, time.time()))
        await anyio.sleep(0.2)
    return {
        "alone_gap_ms": statistics.median(alone_ms),
        "alone_gap_worst_ms": max(alone_ms),
        "attach_gap_ms": statistics.median(attach_ms),
        "attach_gap_worst_ms": max(attach_ms),
        "watched_gap_ms": statistics.median(watched_ms),
        "watched_gap_worst_ms": max(watched_ms),
        "probed_gap_ms": statistics.median(probed_ms),
        "probed_gap_worst_ms": max(probed_ms),
        "probed_to_goal_ratio": statistics.median(probed_ms) / GOAL_MS,
        "watched_to_goal_ratio": statistics.median(watched_ms) / GOAL_MS,
    }
