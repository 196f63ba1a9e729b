"""What an agent does on a good day: moves in every way, limits, levers, and what it refuses."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import pytest

from agents.api import (
    Cancel,
    Check,
    CheckReport,
    Done,
    GetHost,
    HostView,
    JobView,
    Move,
    Pause,
    Refused,
    Resolve,
    Resume,
    SetLimits,
    Watch,
)
from agents.host.jobs import Job
from agents.host.orders import Order
from agents.host.outgoing import Outgoing
from agents.hypervisors.embedded.tracking import FORCE_HOOK_VARIABLE
from agents.journal import JournalEntry, JournalFile
from migrate.phases import Phase
from migrate.plan import OnTimeout
from migrate.preflight import Severity
from tests.agents.host.fleet import HOSTS, NOISE, SLOW, Fleet, in_precopy, report_of, running_fleet
from tests.waiting import delay

# What a machine that runs tests may well be found to be.
BUSY = {"load", "pressure", "swap"}
pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def refusal(fleet: Fleet, host: str, request: object) -> Refused:
    answer = await fleet.ask(host, request)
    if not isinstance(answer, Refused):
        raise AssertionError(answer)
    return answer


async def test_a_guest_moves_there_and_back_three_times_while_it_runs(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a").guest_id
        for number in range(6):
            source, to = HOSTS if number % 2 == 0 else HOSTS[::-1]
            report = report_of(await fleet.move("worker", source, to))
            assert (report.phase, report.error, report.runs_on) == (Phase.COMPLETE, None, to)
            assert report.source_digest == report.destination_digest
            await fleet.check_runs_only_at(to, guest)


async def test_who_asks_a_restarted_agent_at_once_is_told_of_the_attempt_that_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Fleet(folder)
    before.shared.mkdir()
    guest = before.start_guest("host-a").guest_id
    order = Order(job="b" * 32, move=Move(guest=guest, to="host-b"))
    journal = JournalFile.create(before.state_dir("host-a"), "a" * 32)
    facts: dict[str, str | int | bytes | bool] = {
        "guest_id": guest,
        "guest_name": "worker",
        "destination": "host-b",
        "generation": 1,
        "ownership_dir": str(before.shared / ".vmferry"),
        "order": order.to_bytes(),
    }
    journal.append(JournalEntry(step="started", at_s=time.time(), facts=facts))
    journal.close(ended=False)
    at_once = Outgoing.go_on

    async def after_a_while(self: Outgoing, order: Order) -> Job | None:
        await delay(0.3)  # as where a hypervisor takes its time to say which guests it has
        return await at_once(self, order)

    monkeypatch.setattr(Outgoing, "go_on", after_a_while)
    async with running_fleet(folder) as fleet:
        ended = await fleet.follow("host-a", order.job)
        assert ended.phase is Phase.COMPLETE, ended.because
        await fleet.check_runs_only_at("host-b", guest)


async def test_an_offline_move_suspends_copies_and_resumes(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a").guest_id
        report = report_of(await fleet.move("worker", "host-a", "host-b", is_offline=True))
        assert (report.phase, report.error, report.rounds) == (Phase.COMPLETE, None, ())
        assert report.source_digest == report.destination_digest
        await fleet.check_runs_only_at("host-b", guest)


async def test_a_guest_moves_where_only_the_write_hook_sees_its_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE_HOOK_VARIABLE, "1")
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a").guest_id
        report = report_of(await fleet.move("worker", "host-a", "host-b"))
        assert (report.phase, report.tracking) == (Phase.COMPLETE, "write-hook"), report.error
        assert report.source_digest == report.destination_digest
        await fleet.check_runs_only_at("host-b", guest)


async def test_many_guests_move_at_once_in_both_directions(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        ways = {
            fleet.start_guest(HOSTS[n % 2], name=f"g{n}").guest_id: (HOSTS[n % 2], HOSTS[1 - n % 2])
            for n in range(4)
        }

        async def move(guest: str, source: str, to: str) -> None:
            report = report_of(await fleet.move(guest, source, to))
            assert (report.phase, report.error) == (Phase.COMPLETE, None)
            await fleet.check_runs_only_at(to, guest)

        async with anyio.create_task_group() as moves:
            for guest, (source, to) in ways.items():
                moves.start_soon(move, guest, source, to)


async def test_a_second_move_of_a_guest_and_one_too_many_for_the_destination_are_refused_in_words(
    folder: Path,
) -> None:
    async with running_fleet(folder, "incoming = 1") as fleet:
        first = fleet.start_guest("host-a", name="first", **NOISE)
        fleet.start_guest("host-a", name="second", **NOISE)
        job = await fleet.start("first", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)

        again = await refusal(fleet, "host-a", Move(guest=first.guest_id, to="host-b"))
        assert again.code == "busy"
        assert job in again.text

        # The destination takes one at a time.
        second = report_of(await fleet.move("second", "host-a", "host-b"))
        assert second.phase is Phase.ROLLED_BACK
        assert "the limit is 1 ([limits] incoming)" in (second.error or "")

        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        assert (await fleet.follow("host-a", job)).phase is Phase.COMPLETE
        await fleet.check_runs_only_at("host-b", first.guest_id)


async def test_the_limit_of_outgoing_moves_is_said(folder: Path) -> None:
    async with running_fleet(folder, "outgoing = 1") as fleet:
        fleet.start_guest("host-a", name="first", **NOISE)
        fleet.start_guest("host-a", name="second", **NOISE)
        job = await fleet.start("first", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        refused = await refusal(fleet, "host-a", Move(guest="second", to="host-b"))
        assert refused.code == "busy"
        assert "the limit is 1 ([limits] outgoing)" in refused.text
        view = await fleet.ask("host-a", GetHost())
        assert isinstance(view, HostView)
        assert (view.outgoing, view.outgoing_limit) == (1, 1)
        assert isinstance(await fleet.ask("host-a", Cancel(job=job)), Done)
        assert (await fleet.follow("host-a", job)).phase is Phase.ROLLED_BACK


async def test_the_levers_act_while_a_move_runs(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        assert isinstance(await fleet.ask("host-a", Pause(job=job)), Done)
        held = await fleet.until("host-a", job, lambda view: view.is_paused and view.progress.is_paused)
        # What was on its way arrives; then nothing more is sent, and the guest goes on.
        later = await fleet.until(
            "host-a", job, lambda view: view.progress.wire_bytes - held.progress.wire_bytes < 4 << 20
        )
        assert later.phase is Phase.PRECOPY
        assert fleet.describe("host-a", guest).is_running
        limits = SetLimits(job=job, downtime_limit_s=0.5, bandwidth_bytes_per_s=0)
        assert isinstance(await fleet.ask("host-a", limits), Done)
        assert isinstance(await fleet.ask("host-a", Resume(job=job)), Done)
        assert (await fleet.follow("host-a", job)).phase is Phase.COMPLETE
        await fleet.check_runs_only_at("host-b", guest)
        for request in (Pause(job=job), Cancel(job=job), SetLimits(job=job)):
            assert "has ended already" in (await refusal(fleet, "host-a", request)).text


async def test_a_paused_move_sends_nothing(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        fleet.start_guest("host-a", **NOISE)
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        await fleet.ask("host-a", Pause(job=job))
        sent: list[int] = []

        def stands_still(view: JobView) -> bool:
            sent.append(view.progress.wire_bytes)
            return len(sent) >= 5 and len(set(sent[-5:])) == 1

        await fleet.until("host-a", job, stands_still)
        await fleet.ask("host-a", Cancel(job=job))
        assert (await fleet.follow("host-a", job)).phase is Phase.ROLLED_BACK


async def test_a_cancelled_precopy_leaves_the_guest_running_and_nothing_at_the_destination(
    folder: Path,
) -> None:
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        assert len(fleet.machines("host-b")) == 1
        assert isinstance(await fleet.ask("host-a", Cancel(job=job)), Done)
        report = report_of(await fleet.follow("host-a", job))
        assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
        assert report.error == "cancelled by request"
        await fleet.check_runs_only_at("host-a", guest)
        assert fleet.machines("host-b") == []
        assert (await fleet.follow("host-b", job)).phase is Phase.ROLLED_BACK
        # And it can go later.
        assert (await fleet.move("worker", "host-a", "host-b")).phase is Phase.COMPLETE


@pytest.mark.parametrize("on_timeout", list(OnTimeout))
async def test_a_time_limit_ends_the_move_or_suspends_the_guest_as_asked(
    folder: Path, on_timeout: OnTimeout
) -> None:
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start(
            "worker", "host-a", "host-b", bandwidth_bytes_per_s=8 << 20, timeout_s=0.3, on_timeout=on_timeout
        )
        report = report_of(await fleet.follow("host-a", job))
        if on_timeout is OnTimeout.ABORT:
            assert report.phase is Phase.ROLLED_BACK
            assert "the time limit of 0.3 s has passed" in (report.error or "")
            await fleet.check_runs_only_at("host-a", guest)
        else:
            assert report.phase is Phase.COMPLETE, report.error
            assert report.source_digest == report.destination_digest
            await fleet.check_runs_only_at("host-b", guest)


async def test_a_check_tells_every_finding_and_changes_nothing(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a").guest_id
        before = sorted(path.name for path in fleet.shared.iterdir())
        report = await fleet.ask("host-a", Check(guest="worker", to="host-b"))
        assert isinstance(report, CheckReport)
        # Whether this very machine is busy is not this test's business.
        assert {f.severity for f in report.findings if f.check not in BUSY} == {Severity.OK}
        assert {"cpu-features", "storage", "ownership", "memory", "identity"} <= {
            f.check for f in report.findings
        }
        assert set(fleet.shared.iterdir()) - {fleet.shared / ".vmferry"} == {fleet.shared / n for n in before}
        await fleet.check_runs_only_at("host-a", guest)


async def test_a_check_tells_three_problems_at_once(folder: Path) -> None:
    async with running_fleet(folder, embedded='memory_limit = "128MiB"') as fleet:
        disk = folder / "host-a" / "private.img"
        disk.write_bytes(bytes(4096))
        guest = fleet.start_guest("host-a", disk_path=str(disk)).guest_id
        # 128 MiB there, of which a copy of the same guest has 64.
        fleet.start_guest("host-b", guest_id=guest)
        report = await fleet.ask("host-a", Check(guest="worker", to="host-b"))
        assert isinstance(report, CheckReport)
        refused = {
            finding.check: finding for finding in report.findings if finding.severity is Severity.REFUSED
        }
        assert set(refused) == {"storage", "disk-content", "disk-access", "ownership", "memory", "identity"}
        assert all(finding.remedy for finding in refused.values())


async def test_what_does_not_exist_is_named_in_the_refusal(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        fleet.start_guest("host-a", name="twin")
        fleet.start_guest("host-a", name="twin")
        for request, code, words in (
            (Move(guest="nobody", to="host-b"), "unknown-guest", "nobody"),
            (Move(guest="twin", to="host-b"), "unknown-guest", "2 guests"),
            (Move(guest="twin", to="host-c"), "unknown-host", "host-c"),
            (Move(guest="twin", to="host-a"), "unknown-host", "already"),
            (Check(guest="nobody", to="host-b"), "unknown-guest", "nobody"),
            (Watch(job="f" * 32), "unknown-job", "f" * 32),
            (Pause(job="x"), "unknown-job", "x"),
            (Resolve(job="x", act=True), "unknown-job", "x"),
        ):
            answer = await refusal(fleet, "host-a", request)
            assert answer.code == code, answer
            assert words in answer.text


async def test_the_metrics_have_the_figures_of_a_move_that_ended(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        fleet.start_guest("host-a")
        report = report_of(await fleet.move("worker", "host-a", "host-b"))
        assert report.downtime is not None
        for host, direction in zip(HOSTS, ("outgoing", "incoming"), strict=True):
            status, body = await fleet.page(host, "/metrics")
            assert status == 200
            figures = [line for line in body.splitlines() if report.guest_name in line]
            assert any('phase="complete"' in line and line.endswith(" 1.0") for line in figures)
            assert all(f'direction="{direction}"' in line for line in figures)
            assert "vmferry_loop_lateness_seconds_bucket" in body
        _, body = await fleet.page("host-a", "/metrics")
        shown = {
            line.split("{")[0]: float(line.split()[-1]) for line in body.splitlines() if "worker" in line
        }
        assert shown["vmferry_migration_downtime_seconds"] == pytest.approx(report.downtime.total_s)
        assert shown["vmferry_migration_total_seconds"] == pytest.approx(report.total_s)
        assert shown["vmferry_migration_ram_bytes"] == report.ram_bytes
        assert await fleet.page("host-a", "/healthz") == (200, "ok\n")
