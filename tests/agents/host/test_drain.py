"""The end of an agent: a drain lets moves finish, a second signal rolls them back."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from agents.api import GetHost, HostView, Move, Refused, SetLimits
from migrate.phases import Phase
from tests.agents.host.fleet import NOISE, SLOW, in_precopy, report_of, running_fleet

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.mark.parametrize("draining", ["host-a", "host-b"])
async def test_a_drain_refuses_new_moves_and_lets_running_ones_finish(folder: Path, draining: str) -> None:
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        fleet.start_guest("host-a", name="late")
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        fleet.agents[draining].ask_to_end()
        with anyio.fail_after(5):
            while await fleet.page(draining, "/healthz") != (503, "draining\n"):
                await anyio.lowlevel.checkpoint()
        view = await fleet.ask(draining, GetHost())
        assert isinstance(view, HostView)
        assert view.is_draining
        answer = await fleet.ask("host-a", Move(guest="late", to="host-b"))
        if draining == "host-a":
            assert isinstance(answer, Refused)
            assert answer.code == "draining"
        else:
            late = report_of(await fleet.follow("host-a", answer.job))  # type: ignore[attr-defined]
            assert late.phase is Phase.ROLLED_BACK
            assert "being shut down and takes no more guests" in (late.error or "")
        async with fleet.operator("host-a") as channel:  # held open over the end
            await channel.send(SetLimits(job=job, bandwidth_bytes_per_s=0))
            await channel.receive()
            if draining == "host-b":
                assert (await fleet.follow("host-a", job)).phase is Phase.COMPLETE
            with anyio.fail_after(10):
                await fleet.has_ended[draining].wait()
        await fleet.check_runs_only_at("host-b", guest)


@pytest.mark.parametrize("ending", ["host-a", "host-b"])
async def test_a_second_signal_rolls_back_what_runs(folder: Path, ending: str) -> None:
    async with running_fleet(folder, 'outage = "500ms"') as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        fleet.agents[ending].ask_to_end()
        fleet.agents[ending].ask_to_end()
        with anyio.fail_after(10):
            await fleet.has_ended[ending].wait()
        if ending == "host-b":
            report = report_of(await fleet.follow("host-a", job))
            assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
        await fleet.check_runs_only_at("host-a", guest)
        assert fleet.machines("host-b") == []
        journals = fleet.state_dir(ending) / "journal"
        assert list(journals.glob("*.log")) == []
