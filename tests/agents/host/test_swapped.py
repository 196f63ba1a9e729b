"""Sealed records that a man in the middle sends elsewhere: no page of one guest comes into another."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from agents.api import GetHost, HostView, SetLimits
from agents.hypervisors.embedded.spec import EmbeddedSpec
from migrate.phases import Phase
from migrate.stats import Report
from tests.agents.host.fleet import NOISE, SLOW, Fleet, in_precopy, report_of
from tests.agents.host.meddler import Meddler, Way, meddling
from tests.agents.host.network import FRONTS
from tests.agents.host.processes import Processes, running_processes
from tests.waiting import until
from transport.hello import CHALLENGE_BYTES, HELLO_BYTES, PROOF_BYTES

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SWAPS = 3


class Swapper(Meddler):
    """Swaps records, `left` times, between two sessions or between two connections of one."""

    def __init__(self, *, within_session: bool) -> None:
        super().__init__("127.0.0.1")
        self._within_session = within_session
        self._held: tuple[Way, bytes] | None = None
        self.left = 0

    async def meddle(self, way: Way, record: bytes) -> Iterable[tuple[Way, bytes]]:
        if self._held is not None and not self._held[0].is_open:
            self._held = None  # the connection broke of the swap before
        if self.left and self._held is None:
            self._held = way, record
            return []
        if self._held is None:
            return [(way, record)]
        other, earlier = self._held
        is_pair = other is not way and (other.session_id == way.session_id) == self._within_session
        if not is_pair:
            # The one that holds has sent all that it may without an answer, or will.
            return [(way, record)]
        self._held = None
        self.left -= 1
        return [(other, record), (way, earlier)]


class Injector(Meddler):
    """Sends copies of one session's records in the others', `left` times; the session itself gets all of its own."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1")
        self.taken_from: bytes | None = None
        self.left = 0

    async def meddle(self, way: Way, record: bytes) -> Iterable[tuple[Way, bytes]]:
        sent = [(way, record)]
        if self.left and way.session_id == self.taken_from:
            others = [other for other in self.ways if other.session_id != way.session_id and other.is_open]
            sent += [(other, record) for other in others]
            self.left -= len(sent) > 1
        return sent


class Replacer(Meddler):
    """Gives one session nothing but another one's records, for as long as it lasts."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1")
        self.victim: bytes | None = None
        self._newest: bytes | None = None

    async def meddle(self, way: Way, record: bytes) -> Iterable[tuple[Way, bytes]]:
        if way.session_id != self.victim:
            self._newest = record
            return [(way, record)]
        return [(way, self._newest)] if self._newest else []


@asynccontextmanager
async def behind(
    meddler: Meddler, folder: Path, loop: str, *, connections: int = 1, outage: str = "10s"
) -> AsyncIterator[Processes]:
    """Two agents, and he in front of host-b."""
    limits = f'outage = "{outage}"\ndead_peer = "2s"\nconnections = {connections}\n'
    with running_processes(folder, loop, limits, fronts=FRONTS) as processes:
        fleet = processes.fleet
        async with meddling(meddler, "host-b", fleet.control_ports["host-b"], fleet.data_ports["host-b"]):
            yield processes


async def start_two(fleet: Fleet) -> tuple[list[EmbeddedSpec], list[str]]:
    """Have two guests with different RAM on their way from host-a to host-b."""
    guests = [
        fleet.start_guest("host-a", name=f"guest-{number}", seed=number + 1, **NOISE) for number in range(2)
    ]
    jobs = [
        await fleet.start(guest.guest_id, "host-a", "host-b", bandwidth_bytes_per_s=SLOW) for guest in guests
    ]
    for job in jobs:
        await fleet.until("host-a", job, in_precopy)
    return guests, jobs


async def let_go(fleet: Fleet, jobs: list[str]) -> list[Report]:
    for job in jobs:
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
    return [report_of(await fleet.follow("host-a", job)) for job in jobs]


def refusals(processes: Processes) -> list[str]:
    """Why host-b has ended data connections."""
    return [
        str(line["cause"]) for line in processes.lines("host-b") if line["event"] == "data connection ended"
    ]


async def check_arrived(fleet: Fleet, guest: EmbeddedSpec, report: Report) -> None:
    assert report.phase is Phase.COMPLETE, report.error
    assert report.source_digest == report.destination_digest
    await fleet.check_runs_only_at("host-b", guest.guest_id)


async def test_records_swapped_between_two_sessions_open_in_neither(
    folder: Path, anyio_backend_name: str
) -> None:
    meddler = Swapper(within_session=False)
    async with behind(meddler, folder, anyio_backend_name) as processes:
        fleet = processes.fleet
        guests, jobs = await start_two(fleet)
        meddler.left = SWAPS
        await until(lambda: not meddler.left, "the last swap", within_s=50)
        reports = await let_go(fleet, jobs)
        for guest, report in zip(guests, reports, strict=True):
            await check_arrived(fleet, guest, report)
            assert report.link_breaks > 0
        # A connection that broke of the swap before hears of no second one.
        assert sum("does not open" in cause for cause in refusals(processes)) >= SWAPS


async def test_records_of_one_session_sent_in_another_break_that_ones_connection_only(
    folder: Path, anyio_backend_name: str
) -> None:
    meddler = Injector()
    async with behind(meddler, folder, anyio_backend_name) as processes:
        fleet = processes.fleet
        guests, jobs = await start_two(fleet)
        meddler.taken_from = bytes.fromhex(jobs[0])
        meddler.left = SWAPS
        await until(lambda: not meddler.left, "the last swap", within_s=50)
        reports = await let_go(fleet, jobs)
        for guest, report in zip(guests, reports, strict=True):
            await check_arrived(fleet, guest, report)
        assert (reports[0].link_breaks, reports[0].resent_bytes) == (0, 0)
        assert reports[1].link_breaks > 0
        assert sum("does not open" in cause for cause in refusals(processes)) > 0


async def test_records_swapped_between_the_connections_of_one_session_are_applied_once(
    folder: Path, anyio_backend_name: str
) -> None:
    meddler = Swapper(within_session=True)
    async with behind(meddler, folder, anyio_backend_name, connections=2) as processes:
        fleet = processes.fleet
        guests, jobs = await start_two(fleet)
        meddler.left = SWAPS
        await until(lambda: not meddler.left, "the last swap", within_s=50)
        for guest, report in zip(guests, await let_go(fleet, jobs), strict=True):
            await check_arrived(fleet, guest, report)
        # They open: it is the right session. The source does not believe an acknowledgement from the wrong one.
        said = [str(line) for line in processes.lines("host-a") if line["event"] == "data link"]
        assert any("which did not carry it" in line for line in said)


async def test_a_session_that_gets_nothing_but_anothers_records_ends_alone(
    folder: Path, anyio_backend_name: str
) -> None:
    meddler = Replacer()
    async with behind(meddler, folder, anyio_backend_name, outage="2s") as processes:
        fleet = processes.fleet
        guests, jobs = await start_two(fleet)
        meddler.victim = bytes.fromhex(jobs[0])
        ended = report_of(await fleet.follow("host-a", jobs[0]))
        assert (ended.phase, ended.runs_on) == (Phase.ROLLED_BACK, "host-a")
        assert "no data connection worked for 2 s" in (ended.error or "")
        await fleet.check_runs_only_at("host-a", guests[0].guest_id)
        (other,) = await let_go(fleet, jobs[1:])
        await check_arrived(fleet, guests[1], other)
        assert (other.link_breaks, other.resent_bytes) == (0, 0)
        assert any("does not open" in cause for cause in refusals(processes))
        # Nobody meddles any more.
        meddler.victim = None
        await check_arrived(
            fleet, guests[0], report_of(await fleet.move(guests[0].guest_id, "host-a", "host-b"))
        )


def replay(port: int, recorded: bytes) -> bytes:
    """Say again what a source has said; give what comes back after the challenge."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.recv(CHALLENGE_BYTES, socket.MSG_WAITALL)
        answer = b""
        try:
            sock.sendall(recorded[:HELLO_BYTES])
            sock.sendall(recorded[HELLO_BYTES:])
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(65536):
                answer += part
        except OSError:
            pass
        return answer


async def test_a_whole_recorded_session_said_again_is_heard_by_nobody(
    folder: Path, anyio_backend_name: str
) -> None:
    meddler = Meddler("127.0.0.1")
    meddler.is_recording = True
    async with behind(meddler, folder, anyio_backend_name) as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-a", **NOISE)
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, lambda view: view.progress.wire_bytes > 2 << 20)
        # While it lives, after it has ended, and after the agent was started again.
        assert await run_sync(replay, fleet.data_ports["host-b"], bytes(meddler.ways[0].recorded)) == b""
        (report,) = await let_go(fleet, [job])
        await check_arrived(fleet, guest, report)
        assert report.link_breaks == 0
        recorded = bytes(meddler.ways[0].recorded)
        assert len(recorded) > 16 << 20
        assert await run_sync(replay, fleet.data_ports["host-b"], recorded) == b""
        await run_sync(processes.kill, "host-b")
        await run_sync(processes.start, "host-b")
        assert await run_sync(replay, fleet.data_ports["host-b"], recorded) == b""
        assert sum("did not prove" in cause for cause in refusals(processes)) == 3
        assert isinstance(await fleet.ask("host-b", GetHost()), HostView)
        await fleet.check_runs_only_at("host-b", guest.guest_id)


class Mute(Meddler):
    """From some moment on no acknowledgement comes back; control connections are not his."""

    is_mute = False

    async def back(self, chunk: bytes) -> bool:
        # A handshake's proof may pass, so that the connection looks well.
        return not self.is_mute or len(chunk) in (CHALLENGE_BYTES, PROOF_BYTES)


async def test_a_destination_that_never_acknowledges_is_left_within_the_outage(
    folder: Path, anyio_backend_name: str
) -> None:
    meddler = Mute("127.0.0.1")
    limits = 'outage = "3s"\ndead_peer = "1s"\n'
    with running_processes(folder, anyio_backend_name, limits, fronts=FRONTS) as processes:
        fleet = processes.fleet
        straight = Meddler("127.0.0.1")
        async with (
            meddling(meddler, "host-b", fleet.data_ports["host-b"]),
            meddling(straight, "host-b", fleet.control_ports["host-b"]),
        ):
            guest = fleet.start_guest("host-a", **NOISE)
            job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
            await fleet.until("host-a", job, in_precopy)
            meddler.is_mute = True
            with anyio.fail_after(20):
                report = report_of(await fleet.follow("host-a", job))
            assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
            assert "nothing was acknowledged" in (report.error or ""), report.error
            await fleet.check_runs_only_at("host-a", guest.guest_id)
            meddler.is_mute = False
            await check_arrived(fleet, guest, report_of(await fleet.move("worker", "host-a", "host-b")))
