"""A QEMU that is stopped for a moment by one task, and for longer by another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import anyio
import anyio.to_thread
import pytest

from agents.hypervisors.qemu.errors import QmpFailed
from agents.hypervisors.qemu.guest import Hold
from agents.hypervisors.qemu.running import QemuRunningGuest
from memory.runs import Runs, empty_runs
from tests.agents.scripted_agent import guest_facts

pytestmark = pytest.mark.anyio


class FakeQmp:
    """QEMU's run state; commands are obeyed one after another. It has no transactions."""

    def __init__(self) -> None:
        self.is_running = True
        self.said: list[str] = []
        self._turn = anyio.Lock()

    async def execute(self, command: str, arguments: object = None, **more: object) -> object:
        async with self._turn:
            await anyio.lowlevel.checkpoint()
            self.said.append(command)
            if command == "transaction":
                raise QmpFailed(command, "CommandNotFound", "no such command")
            if command == "query-migrate":
                return {}
            if command in ("stop", "cont"):
                self.is_running = command == "cont"
            return {"status": "running" if self.is_running else "paused"}

    async def wait_event(self, name: str, **more: object) -> object:
        return {"timestamp": {"seconds": 1, "microseconds": 0}}

    def forget_events(self) -> None:
        pass


def running_guest(qmp: FakeQmp) -> QemuRunningGuest:
    held = SimpleNamespace(
        qmp=qmp, places=(), process=SimpleNamespace(pid=1), spec=SimpleNamespace(disks=("a disk",))
    )
    return QemuRunningGuest(cast(Hold, held), guest_facts(), ())


async def test_a_harvest_at_a_standstill_lets_the_guest_go_on() -> None:
    qmp = FakeQmp()
    guest = running_guest(qmp)
    seen: list[bool] = []

    def harvest() -> Runs:
        seen.append(qmp.is_running)
        return empty_runs()

    await anyio.to_thread.run_sync(guest._standing_still, harvest)
    assert (seen, qmp.is_running) == ([False], True)


@pytest.mark.parametrize("when", ["in the harvest", "beside it"])
async def test_a_guest_that_is_paused_meanwhile_stays_paused(when: str) -> None:
    qmp = FakeQmp()
    guest = running_guest(qmp)

    def harvest() -> Runs:
        if when == "in the harvest":
            anyio.from_thread.run(guest.pause)
        return empty_runs()

    async with anyio.create_task_group() as both:
        both.start_soon(anyio.to_thread.run_sync, guest._standing_still, harvest)
        if when == "beside it":
            both.start_soon(guest.pause)
    assert not qmp.is_running
    await guest.resume()
    assert qmp.is_running


async def test_a_guest_that_is_paused_while_it_is_drained_stays_paused() -> None:
    for pause_first in (True, False):
        qmp = FakeQmp()
        guest = running_guest(qmp)
        async with anyio.create_task_group() as both:
            for what in (guest.pause, guest.drain) if pause_first else (guest.drain, guest.pause):
                both.start_soon(what)
        assert not qmp.is_running
        assert "stop" in qmp.said
