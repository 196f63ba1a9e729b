"""Stock QEMU guests when something goes wrong: one copy goes on, whole, and a sentence says why."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from agents.api import JobList, ListJobs, SetLimits
from agents.hypervisors.qemu import driver
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.describe import block_places, vcpu_threads
from agents.hypervisors.qemu.launch import launch
from agents.hypervisors.qemu.processmap import places_of
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.spec import QemuSpec
from agents.hypervisors.qemu.tracking import QemuTracker
from memory.dirty import TrackerSupport
from memory.layout import PAGE_BYTES
from migrate.copying import Copier
from migrate.lastround import LastRound
from migrate.phases import Phase
from tests.agents.host.fleet import HOSTS, in_precopy, report_of
from tests.agents.host.processes import Processes
from tests.agents.host.qemu_guests import QemuGuests, qemu_fleet, qemu_processes, vm_flags
from tests.agents.hypervisors.qemu.conftest import QEMU, needs_qemu

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    needs_qemu(),
    pytest.mark.dealt,
]

SLOW = 4 << 20
LIMITS = 'outage = "0.5s"\ndead_peer = "1s"'
run_sync = anyio.to_thread.run_sync


async def begin(guests: QemuGuests, spec: QemuSpec) -> str:
    """Start a guest and a move of it that stays in the pre-copy."""
    await guests.start("host-a", spec)
    job = await guests.fleet.start(spec.guest_id, "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
    await guests.fleet.until("host-a", job, in_precopy)
    return job


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------------- QEMU ends


async def test_a_destination_qemu_that_is_killed_leaves_the_guest_where_it_was(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        job = await begin(guests, spec)
        kill(guests.pid("host-b", spec))
        await guests.fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        view = await guests.fleet.follow("host-a", job)
        assert view.report is not None
        await guests.check_stayed(spec, view.report, "host-a", "host-b")
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_source_qemu_that_is_killed_leaves_nothing_at_the_destination(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        job = await begin(guests, spec)
        kill(guests.pid("host-a", spec))
        view = await guests.fleet.follow("host-a", job)
        assert view.phase is Phase.ROLLED_BACK
        assert "has ended" in ((view.report and view.report.error) or "")
        assert (guests.pid("host-a", spec), guests.pid("host-b", spec)) == (None, None)


async def test_a_machine_that_differs_in_one_device_does_not_take_the_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def launch_another(spec: QemuSpec, host: QemuHost, *, is_incoming: bool) -> tuple[Qmp, QemuPaths]:
        return await launch(replace(spec, has_rng=False), host, is_incoming=is_incoming)

    async with qemu_fleet(folder) as guests:
        spec = guests.spec(has_rng=True)
        await guests.start("host-a", spec)
        monkeypatch.setattr(driver, "launch", launch_another)
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_stayed(spec, report, "host-a", "host-b")
        assert "device state" in (report.error or "")
        monkeypatch.undo()
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_moved(spec, report, "host-a", "host-b")


# ---------------------------------------------------------------------- agents end


async def one_home(guests: QemuGuests, spec: QemuSpec) -> str:
    """Insist that the guest runs on exactly one host, works there, and that nothing of it is on the other."""
    homes = [host for host in HOSTS if guests.pid(host, spec) is not None]
    assert len(homes) == 1, homes
    await guests.check_runs(homes[0], spec)
    return homes[0]


async def phases(processes: Processes, host: str) -> list[Phase]:
    listed = await processes.fleet.ask(host, ListJobs())
    assert isinstance(listed, JobList)
    return [job.phase for job in listed.jobs]


async def test_a_killed_source_agent_leaves_its_guest_as_it_was(
    folder: Path, anyio_backend_name: str
) -> None:
    with qemu_processes(folder, anyio_backend_name, LIMITS) as (processes, guests):
        spec = guests.spec()
        job = await begin(guests, spec)
        await run_sync(processes.kill, "host-a")
        # Its dirty log ended with it.
        assert "uw" not in vm_flags(guests.pid("host-a", spec))
        assert (await processes.fleet.follow("host-b", job)).phase is Phase.ROLLED_BACK
        assert await one_home(guests, spec) == "host-a"
        await run_sync(processes.start, "host-a")
        # The order stands, and begins again from the start.
        await guests.fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        report = report_of(await guests.fleet.follow("host-a", job))
        assert report.kept_pages == 0
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_source_agent_that_is_restarted_goes_on_with_what_the_destination_has(
    folder: Path, anyio_backend_name: str
) -> None:
    with qemu_processes(folder, anyio_backend_name, 'outage = "60s"\ndead_peer = "1s"') as (
        processes,
        guests,
    ):
        spec, fleet = guests.spec(), guests.fleet
        job = await begin(guests, spec)
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=8 * SLOW))
        await fleet.until("host-a", job, lambda view: view.progress.wire_bytes > 32 << 20)
        await run_sync(processes.kill, "host-a")
        await guests.check_runs("host-a", spec)
        await run_sync(processes.start, "host-a")
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        report = report_of(await fleet.follow("host-a", job))
        # Its working set of 48 MiB has been written meanwhile; the rest is there.
        assert report.kept_pages * PAGE_BYTES > 16 << 20
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_guest_whose_last_pages_do_not_arrive_runs_on_and_stops_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_last, stalls = Copier.send_last, [True, True]

    async def stall(copier: Copier, last: LastRound, on_given: Callable[[int], None]) -> None:
        if stalls:
            stalls.pop()
            await anyio.sleep_forever()
        await send_last(copier, last, on_given)

    monkeypatch.setattr(Copier, "send_last", stall)
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        report = await guests.move(spec, "host-a", "host-b")
        assert stalls == []
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_killed_destination_agent_leaves_no_machine_behind(
    folder: Path, anyio_backend_name: str
) -> None:
    with qemu_processes(folder, anyio_backend_name, LIMITS) as (processes, guests):
        spec = guests.spec()
        job = await begin(guests, spec)
        await run_sync(processes.kill, "host-b")
        view = await processes.fleet.follow("host-a", job)
        assert view.phase is Phase.ROLLED_BACK
        # The empty machine outlives its agent, and the next agent ends it.
        await run_sync(processes.start, "host-b")
        assert await phases(processes, "host-b") == [Phase.ROLLED_BACK]
        assert await one_home(guests, spec) == "host-a"
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_moved(spec, report, "host-a", "host-b")


@pytest.mark.parametrize(
    ("host", "step", "after_s"),
    [
        ("host-b", "prepared", 0.0),
        ("host-b", "prepared", 0.15),
        ("host-a", "commit-may-leave", 0.0),
        ("host-a", "commit-may-leave", 0.01),
        ("host-a", "commit-may-leave", 0.02),
        ("host-a", "commit-may-leave", 0.03),
    ],
)
async def test_both_agents_that_die_leave_exactly_one_guest(
    folder: Path, anyio_backend_name: str, host: str, step: str, after_s: float
) -> None:
    with qemu_processes(folder, anyio_backend_name, LIMITS) as (processes, guests):
        spec = guests.spec()
        await guests.start("host-a", spec)
        job = await processes.fleet.start(spec.guest_id, "host-a", "host-b")
        await run_sync(processes.kill_at, host, step, after_s)
        running = [name for name in HOSTS if await guests.state(name, spec) == "running"]
        assert len(running) <= 1, running
        await run_sync(processes.start, *HOSTS)
        # Whoever owns it runs it; if that is the source, the move goes on.
        ended = await guests.fleet.follow("host-a", job)
        assert ended.phase is Phase.COMPLETE, ended.because
        assert await one_home(guests, spec) == "host-b"
        report = await guests.move(spec, "host-b", "host-a")
        await guests.check_moved(spec, report, "host-b", "host-a")


# ---------------------------------------------------------------------- what is refused


async def test_a_kernel_that_shows_no_writes_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = TrackerSupport(uffd_wp=False, soft_dirty=False, problems=("uffd-wp: needs Linux 6.7",))
    monkeypatch.setattr("agents.hypervisors.qemu.tracking.probe_kernel", lambda: blind)
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_stayed(spec, report, "host-a", "host-b")
        assert "needs Linux 6.7" in (report.error or "")
        assert "--offline" in (report.error or "")
        report = await guests.move(spec, "host-a", "host-b", is_offline=True)
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_another_machine_than_x86_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.hypervisors.qemu.tracking.platform.machine", lambda: "riscv64")
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_stayed(spec, report, "host-a", "host-b")
        assert "riscv64" in (report.error or "")


async def test_a_guest_that_a_debugger_holds_is_said_and_one_thread_less_is_no_matter(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        pid = guests.pid("host-a", spec)
        assert pid is not None
        # The main thread alone: another one serves.
        with _debugger([pid]):
            report = await guests.move(spec, "host-a", "host-b")
            await guests.check_moved(spec, report, "host-a", "host-b")
        pid = guests.pid("host-b", spec)
        assert pid is not None
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        with _debugger(threads):
            report = await guests.move(spec, "host-b", "host-a")
            assert report.phase is Phase.ROLLED_BACK
            assert "cannot be traced" in (report.error or "")
        await guests.check_stayed(spec, report, "host-b", "host-a")


async def test_a_second_dirty_log_says_who_has_the_first(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec)
        pid = guests.pid("host-a", spec)
        assert pid is not None
        async with guests.monitor("host-a", spec) as qmp:
            places = places_of(pid, await block_places(qmp, spec))
            threads = await vcpu_threads(qmp)
        other = QemuTracker(pid, threads, places[0].areas(0), lambda harvest: harvest())
        await run_sync(other.start)
        try:
            report = await guests.move(spec, "host-a", "host-b")
            await guests.check_stayed(spec, report, "host-a", "host-b")
            assert f"another tracker holds the RAM of process {pid}" in (report.error or "")
        finally:
            await run_sync(other.stop)
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_device_that_qemu_does_not_migrate_is_refused_with_its_reason(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec(machine="pc-i440fx-7.2")
        await guests.start("host-a", spec)
        async with guests.monitor("host-a", spec) as qmp:
            await qmp.execute(
                "object-add",
                {"qom-type": "memory-backend-memfd", "id": "peer", "size": 1 << 20, "share": True},
            )
            await qmp.execute(
                "device_add", {"driver": "ivshmem-plain", "id": "shm", "memdev": "peer", "master": False}
            )
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_stayed(spec, report, "host-a", "host-b")
        assert "ivshmem" in (report.error or "")
        assert "peer" in (report.error or "")


async def test_a_qemu_with_private_ram_is_named_and_never_touched(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        guests.specs[spec.guest_id] = spec
        paths = guests.paths("host-a", spec)
        paths.qmp.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [
            *(str(QEMU), "-name", "theirs", "-uuid", spec.guest_id, "-machine", "pc-q35-7.2,accel=tcg"),
            *("-cpu", "Nehalem", "-m", "64M", "-nodefaults", "-display", "none", "-serial", "null"),
            *("-qmp", f"unix:{paths.qmp},server=on,wait=off", "-daemonize", "-pidfile", str(paths.pid)),
        ]
        await run_sync(lambda: subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=-3))
        report = await guests.move(spec, "host-a", "host-b")
        assert report.phase is Phase.ROLLED_BACK
        assert "RAM is private to QEMU" in (report.error or "")
        assert "memory-backend-memfd" in (report.error or "")
        assert guests.pid("host-a", spec) is not None


class _debugger:  # noqa: N801  # used as a statement: with _debugger([tid]):
    """A process that traces threads, as a debugger does, and lets them run."""

    _PROGRAM = """
import ctypes, sys, time
libc = ctypes.CDLL(None, use_errno=True)
for tid in map(int, sys.argv[1:]):
    if libc.ptrace(0x4206, tid, None, None) == -1:
        sys.exit(f"{tid}: {ctypes.get_errno()}")
print("ready", flush=True)
time.sleep(600)
"""

    def __init__(self, threads: list[int]) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        self._process = subprocess.Popen(
            ["/usr/bin/env", "python3", "-c", self._PROGRAM, *map(str, self._threads)], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
