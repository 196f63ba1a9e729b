"""`vmferry selftest`: what direct mode needs of this machine, tried with the real thing, one after the other.

Law: each check tries one thing and says what it saw; none is skipped in silence. A scratch guest is started for it and
ended, whatever happens; nothing else on the machine is touched. Much of this has only been shown on other machines: run
it on the hosts that count.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import anyio
import anyio.to_thread
import numpy as np

from agents.demo.errors import DemoFailed
from agents.demo.qemu import QemuDemoGuest, best_accel, find_qemu
from agents.demo.run import Demo, GuestKind, Show, run_demo
from agents.demo.scratch import SOURCE, Scratch, open_scratch
from agents.errors import AgentError
from agents.hypervisors.qemu.describe import vcpu_threads
from agents.hypervisors.qemu.driver import QemuHypervisor
from agents.hypervisors.qemu.hostmodels import ModelCatalog
from agents.hypervisors.qemu.processmap import threads_to_trace
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.running import QemuRunningGuest
from agents.hypervisors.qemu.spec import Accel
from agents.hypervisors.qemu.tracking import steal_uffd
from agents.testguest.image import find_kernel
from memory.dirty import probe_kernel
from memory.errors import RamError
from memory.layout import PAGE_BYTES
from memory.runs import Runs, pages_in, whole
from migrate.errors import MigrationError

__all__ = ["Check", "State", "run_selftest"]

RAM_BYTES: Final = 256 << 20
DIRTY_BYTES_PER_S: Final = 50 << 20
INJECTIONS: Final = 20
ROUNDS: Final = 10
ROUND_S: Final = 0.1


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check. `saw` has the figures, or the cause."""

    name: str
    state: State
    saw: str


class _Failed(Exception):
    """A check that found what must not be; the sentence says what."""


async def run_selftest(show: Show) -> list[Check]:
    """Try everything; what depends on a check that failed is not tried."""
    checks: list[Check] = []

    async def attempt(name: str, trial: Callable[[], Awaitable[str]]) -> bool:
        show.begins(name)
        try:
            saw, state = await trial(), State.OK
        except (_Failed, AgentError, MigrationError, RamError, OSError) as exc:
            saw, state = str(exc) or type(exc).__name__, State.FAILED
        checks.append(Check(name=name, state=state, saw=saw))
        show.done(f"{name}: {'' if state is State.OK else 'FAILED: '}{saw}")
        return state is State.OK

    def leave_out(*names: str) -> None:
        checks.extend(
            Check(name=name, state=State.NOT_TRIED, saw="an earlier check failed") for name in names
        )

    await attempt("kernel", _kernel)
    if not await attempt("qemu", _qemu):
        leave_out("guest", "injection", "tracking", "drain", "holes", "move")
        return checks
    with open_scratch(keep=False) as scratch:
        guest = QemuDemoGuest(
            scratch,
            ram_bytes=RAM_BYTES,
            dirty_bytes_per_s=DIRTY_BYTES_PER_S,
            binary=find_qemu(),
            accel=best_accel(),
        )
        try:
            if await attempt("guest", lambda: _boot(guest)):
                await attempt("injection", lambda: _inject(scratch, guest))
                await attempt("tracking", lambda: _track(guest))
                await attempt("drain", lambda: _drain(scratch, guest))
                await attempt("holes", lambda: _holes(guest))
            else:
                leave_out("injection", "tracking", "drain", "holes")
        finally:
            await guest.end()
    if all(check.state is State.OK for check in checks):
        await attempt("move", lambda: _move(show))
    else:
        leave_out("move")
    return checks


async def _kernel() -> str:
    support = await anyio.to_thread.run_sync(probe_kernel)
    release = f"Linux {platform.release()}, {platform.machine()}"
    if support.uffd_wp:
        return f"{release}: writes are seen by userfaultfd (asynchronous write-protection) and PAGEMAP_SCAN"
    if support.soft_dirty:
        return (
            f"{release}: writes are seen by soft-dirty bits, with a standstill of the guest for each harvest"
        )
    raise _Failed(f"{release}: {'; '.join(support.problems)}: guests can be moved offline only")


async def _qemu() -> str:
    binary, accel = find_qemu(), best_accel()
    models = await ModelCatalog(binary).of(accel)
    kernel = await anyio.to_thread.run_sync(find_kernel)
    without = (
        "" if accel is Accel.KVM else " (no hardware virtualisation here, or /dev/kvm is not for this user)"
    )
    return (
        f"QEMU {models.version} with {accel}{without}, {len(models.machines)} machine types; kernel {kernel}"
    )


async def _boot(guest: QemuDemoGuest) -> str:
    began_s = time.monotonic()
    await guest.start(SOURCE)
    return f"Linux runs and writes, {time.monotonic() - began_s:.1f} s after its start"


@asynccontextmanager
async def _held(guest: QemuDemoGuest) -> AsyncIterator[QemuRunningGuest]:
    """The scratch guest, as a migration holds it."""
    held = await QemuHypervisor(guest.host(SOURCE), SOURCE).open_guest(guest.guest_id)
    try:
        yield held
    finally:
        await held.release()


async def _inject(scratch: Scratch, guest: QemuDemoGuest) -> str:
    paths = QemuPaths.of_guest(scratch.qemu_dir(SOURCE), guest.guest_id)
    qmp = await Qmp.connect(paths.monitor)
    try:
        threads = threads_to_trace(qmp.peer_pid, await vcpu_threads(qmp))
        pid = qmp.peer_pid
    finally:
        await qmp.aclose()
    took_ms = []
    for _ in range(INJECTIONS):
        began_s = time.perf_counter()
        os.close(await anyio.to_thread.run_sync(steal_uffd, pid, threads))
        took_ms.append((time.perf_counter() - began_s) * 1e3)
    look = await guest.look(SOURCE)
    if look.errors or not look.is_running:
        raise _Failed(f"the guest is {look.state} with {look.errors} errors after {INJECTIONS} injections")
    return f"{INJECTIONS} system calls injected, {sorted(took_ms)[INJECTIONS // 2]:.0f} ms each; the guest is well"


async def _track(guest: QemuDemoGuest) -> str:
    """Keep a copy by the log alone, and compare all of it with the RAM when the guest stands still."""
    async with _held(guest) as held:
        ram = held.ram
        copy = np.zeros((ram.total_pages, PAGE_BYTES), np.uint8)

        def take(runs: Runs) -> None:
            for first, pages in runs.tolist():
                ram.gather(np.array([[first, pages]]), copy[first : first + pages].reshape(-1).data)

        await anyio.to_thread.run_sync(held.tracker.start)
        runs = await anyio.to_thread.run_sync(ram.populated_runs)
        harvested = 0
        scan_ms: list[float] = []
        for _ in range(ROUNDS):
            await held.drain()
            await anyio.to_thread.run_sync(take, runs)
            await anyio.sleep(ROUND_S)
            began_s = time.perf_counter()
            runs = await anyio.to_thread.run_sync(held.tracker.harvest)
            scan_ms.append((time.perf_counter() - began_s) * 1e3)
            harvested += pages_in(runs)
        await held.drain()
        await anyio.to_thread.run_sync(take, runs)
        standing_ms = await held.pause() * 1e3
        try:
            await anyio.to_thread.run_sync(take, await anyio.to_thread.run_sync(held.tracker.harvest))
            now = np.empty_like(copy)
            await anyio.to_thread.run_sync(ram.gather, whole(ram.total_pages), now.reshape(-1).data)
            stale = int(np.count_nonzero((now != copy).any(axis=1)))
        finally:
            await held.resume()
        method = held.tracker.method
        await anyio.to_thread.run_sync(held.tracker.stop)
    if stale or not harvested:
        raise _Failed(f"{method}: {stale} of {ram.total_pages} pages differ that the log did not have")
    scan = sorted(scan_ms)[len(scan_ms) // 2]
    return (
        f"{method}: {harvested} pages in {ROUNDS} harvests of {scan:.1f} ms, none of {ram.total_pages} pages stale; "
        f"stopped {standing_ms:.1f} ms before we knew"
    )


async def _drain(scratch: Scratch, guest: QemuDemoGuest) -> str:
    qmp = await Qmp.connect(QemuPaths.of_guest(scratch.qemu_dir(SOURCE), guest.guest_id).monitor)
    try:
        began_s = time.perf_counter()
        await qmp.execute("transaction", {"actions": []})
        took_ms = (time.perf_counter() - began_s) * 1e3
    finally:
        await qmp.aclose()
    return f"an empty transaction drains the disks of a running guest ({took_ms:.1f} ms without any)"


async def _holes(guest: QemuDemoGuest) -> str:
    async with _held(guest) as held:
        await held.pause()
        try:
            before = pages_in(held.ram.populated_runs())
            buffer = memoryview(bytearray(256 * PAGE_BYTES))
            for first in range(0, held.ram.total_pages, 256):
                pages = min(256, held.ram.total_pages - first)
                held.ram.gather(np.array([[first, pages]]), buffer)
            after = pages_in(held.ram.populated_runs())
        finally:
            await held.resume()
    if after != before:
        raise _Failed(f"reading the RAM made {after - before} pages that were holes")
    return f"{held.ram.total_pages - before} of {held.ram.total_pages} pages are holes and stay so when they are read"


async def _move(show: Show) -> str:
    class Quiet:
        """The move's own steps are not this command's."""

        def begins(self, sentence: str) -> None:
            show.begins(f"move: {sentence}")

        def done(self, sentence: str) -> None:
            pass

        def moving(self, view: object) -> None:
            pass

    order = Demo(ram_bytes=RAM_BYTES, dirty_bytes_per_s=DIRTY_BYTES_PER_S, kind=GuestKind.QEMU)
    try:
        outcome = await run_demo(order, Quiet())
    except DemoFailed as exc:
        raise _Failed("; ".join(exc.causes)) from exc
    report = outcome.report
    if not outcome.proof.holds or report.downtime is None:
        raise _Failed(f"the proof does not hold: {', '.join(outcome.proof.failed)}; see {outcome.folder}")
    return (
        f"a guest moved between two agents of this machine in {report.total_s:.2f} s, stopped for "
        f"{report.downtime.total_s * 1e3:.1f} ms, its RAM equal to the byte"
    )
