"""Agents that die without warning, at every moment that matters: exactly one copy of the guest is left."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from anyio.to_thread import run_sync

from agents.api import JobList, ListJobs, SetLimits
from agents.hypervisors.embedded.errors import GuestGone
from memory.layout import PAGE_BYTES
from migrate.phases import Phase
from tests.agents.host.fleet import HOSTS, NOISE, SLOW, Fleet, in_precopy, report_of
from tests.agents.host.processes import Processes, running_processes

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

NOISE_BYTES = 16 << 20
LIMITS = 'outage = "500ms"\ndead_peer = "1s"'


async def host_with(fleet: Fleet, guest_id: str) -> str:
    """The host whose machine of the guest runs; there must be exactly one machine of it."""
    homes = [host for host in HOSTS if any(guest_id in name for name in fleet.machines(host))]
    assert len(homes) == 1
    await fleet.check_runs_only_at(homes[0], guest_id)
    return homes[0]


def is_running(fleet: Fleet, host: str, guest_id: str) -> bool:
    try:
        return fleet.describe(host, guest_id).is_running
    except GuestGone:
        return False  # there is none, or it ends just now with the agent that held it


async def jobs(fleet: Fleet, host: str) -> JobList:
    listed = await fleet.ask(host, ListJobs())
    assert isinstance(listed, JobList)
    return listed


def said(processes: Processes, host: str, event: str, words: str) -> bool:
    return any(line["event"] == event and words in str(line) for line in processes.lines(host))


async def test_a_destination_that_dies_in_the_precopy_leaves_the_guest_at_the_source(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        await run_sync(processes.kill, "host-b")
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
        assert "down for 0.5 s" in (report.error or "") or "worked for 0.5 s" in (report.error or "")
        assert await host_with(fleet, guest) == "host-a"
        # It remembers what it began, and that nothing came of it.
        await run_sync(processes.start, "host-b")
        assert [view.phase for view in (await jobs(fleet, "host-b")).jobs] == [Phase.ROLLED_BACK]
        assert (await fleet.move("worker", "host-a", "host-b")).phase is Phase.COMPLETE
        assert await host_with(fleet, guest) == "host-b"


async def test_a_source_that_dies_in_the_precopy_leaves_the_guest_untouched(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        await run_sync(processes.kill, "host-a")
        assert fleet.describe("host-a", guest).is_running
        gone = await fleet.follow("host-b", job)
        assert gone.phase is Phase.ROLLED_BACK
        assert "the source was silent for 1.5 s" in gone.because
        assert fleet.machines("host-b") == []
        assert await host_with(fleet, guest) == "host-a"
        await run_sync(processes.start, "host-a")
        assert said(processes, "host-a", "unfinished migration found", job)
        # The order stands: it begins again, from the start. Nothing of the dead agent's dirty log is in its way.
        await fleet.until("host-a", job, in_precopy)
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.kept_pages) == (Phase.COMPLETE, 0), report.error
        assert report.source_digest == report.destination_digest
        assert await host_with(fleet, guest) == "host-b"


async def test_a_source_that_is_restarted_goes_on_with_what_the_destination_has(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, 'outage = "20s"\ndead_peer = "1s"') as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, lambda view: view.progress.wire_bytes > NOISE_BYTES // 2)
        await run_sync(processes.kill, "host-a")
        await run_sync(processes.start, "host-a")
        view = await fleet.until("host-a", job, lambda view: view.phase is Phase.PRECOPY)
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        report = report_of(await fleet.follow("host-a", job))
        assert report.phase is Phase.COMPLETE, report.error
        assert report.source_digest == report.destination_digest
        assert report.kept_pages * PAGE_BYTES > NOISE_BYTES // 3
        # What was under way when it died, and what the guest wrote since, and nothing else.
        assert report.wire_bytes < NOISE_BYTES * 2 // 3
        assert await host_with(fleet, guest) == "host-b"
        assert view.job == job
        ended = (await jobs(fleet, "host-b")).jobs
        assert [one.phase for one in ended] == [Phase.ROLLED_BACK, Phase.COMPLETE]
        assert "goes on in migration" in ended[0].because


async def test_a_destination_that_is_restarted_is_sent_everything_again(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, 'outage = "20s"\ndead_peer = "1s"') as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        await run_sync(processes.kill, "host-b")
        await run_sync(processes.start, "host-b")
        assert said(processes, "host-b", "unfinished migration found", job)
        with anyio.fail_after(20):
            while (await jobs(fleet, "host-b")).jobs[-1].phase is not Phase.PRECOPY:
                await anyio.lowlevel.checkpoint()
        assert fleet.describe("host-a", guest).is_running
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.kept_pages) == (Phase.COMPLETE, 0), report.error
        assert report.source_digest == report.destination_digest
        assert await host_with(fleet, guest) == "host-b"


@pytest.mark.parametrize(
    ("host", "step", "after_s"),
    [
        ("host-a", "commit-may-leave", 0.0),
        ("host-b", "may-claim", 0.0),
        ("host-b", "may-claim", 0.003),
    ],
)
async def test_both_agents_that_die_around_commit_leave_exactly_one_guest(
    folder: Path, anyio_backend_name: str, host: str, step: str, after_s: float
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-a").guest_id
        job = await fleet.start("worker", "host-a", "host-b")
        await run_sync(processes.kill_at, host, step, after_s)
        assert sum(is_running(fleet, name, guest) for name in HOSTS) <= 1
        # Both ask the record at once, and it answers both the same. If the guest is the source's, the move goes on.
        await run_sync(processes.start, *HOSTS)
        assert sum(is_running(fleet, name, guest) for name in HOSTS) <= 1
        ended = await fleet.follow("host-a", job)
        assert ended.phase is Phase.COMPLETE, ended.because
        assert await host_with(fleet, guest) == "host-b"
        for name in HOSTS:
            assert all(view.has_ended for view in (await jobs(fleet, name)).jobs)
        assert (await fleet.move("worker", "host-b", "host-a")).phase is Phase.COMPLETE


async def test_a_destination_frozen_before_it_was_asked_gives_the_guest_to_the_source(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-a").guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        processes.signal("host-b", signal.SIGSTOP)
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
        processes.signal("host-b", signal.SIGCONT)
        assert (await fleet.follow("host-b", job)).phase is Phase.ROLLED_BACK
        assert await host_with(fleet, guest) == "host-a"


async def test_an_agent_obeys_sigterm_and_drains(folder: Path, anyio_backend_name: str) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=16 << 20)
        await fleet.until("host-a", job, in_precopy)
        processes.signal("host-a", signal.SIGTERM)
        with anyio.fail_after(5):
            while await fleet.page("host-a", "/healthz") != (503, "draining\n"):
                await anyio.lowlevel.checkpoint()
        process = processes.running.pop("host-a")
        assert await run_sync(process.wait, 20) == 0
        assert await host_with(fleet, guest) == "host-b"


async def test_a_configuration_with_mistakes_is_one_message_and_exit_code_2(folder: Path) -> None:
    path = folder / "agent.toml"
    path.write_text(
        '[agent]\nname = "Not A Name"\nlisten = "nowhere"\ncolour = "red"\n'
        '[storage]\nshared_dirs = ["/nonexistent"]\n[limits]\noutgoing = 0\n'
    )
    for verb in ("run", "check"):
        ended = await anyio.run_process(
            [sys.executable, "-m", "agents.cli", "agent", verb, "--config", str(path)], check=False
        )
        words = ended.stderr.decode()
        assert ended.returncode == 2
        for key in ("name", "listen", "colour", "shared_dirs", "outgoing", "ca", "certificate", "key"):
            assert key in words, words
        assert "Traceback" not in words
        assert ended.stdout == b""
