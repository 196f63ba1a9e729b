"""How the driver finds a guest among others: real QEMU processes that run their firmware and nothing else."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agents.hypervisors.qemu import driver, hostmodels
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.driver import QemuHypervisor
from agents.hypervisors.qemu.found import connected
from agents.hypervisors.qemu.guestfacts import facts_of
from agents.hypervisors.qemu.launch import Process, end, launch
from agents.hypervisors.qemu.rundir import QemuPaths
from agents.hypervisors.qemu.spec import Accel
from migrate.errors import GuestUnknown
from migrate.facts import CpuFacts
from tests.agents.hypervisors.qemu.conftest import PLAIN, QEMU, needs_qemu

pytestmark = [pytest.mark.anyio, needs_qemu()]


@pytest.fixture
def host() -> Iterator[QemuHost]:
    # A short name: sockets are in it.
    folder = Path(tempfile.mkdtemp(prefix="vmferry-"))
    yield QemuHost(dir=folder, binary=QEMU, shared_dirs=(), accels=(Accel.TCG,))
    shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def guests_of(host: QemuHost, count: int) -> AsyncIterator[list[QemuPaths]]:
    """Run so many guests; give where each is known by."""
    async with contextlib.AsyncExitStack() as ends:
        found = []
        for number in range(count):
            spec = replace(PLAIN, guest_id=str(uuid.uuid4()), name=f"web{number}")
            qmp, paths = await launch(spec, host, is_incoming=False)
            process = Process(qmp.peer_pid)
            await qmp.aclose()
            ends.callback(process.close)
            ends.push_async_callback(end, None, process, paths)
            # Its end is not asked for: nobody listens to what it says then.
            ends.callback(process.kill)
            found.append(paths)
        yield found


async def test_a_guest_that_was_seen_is_opened_without_a_question_to_the_others(
    host: QemuHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hundred guests on a host they are a hundred connections, three times a move."""
    asked: list[Path] = []

    def note(monitor: Path, *, timeout_s: float) -> object:
        asked.append(monitor)
        return connected(monitor, timeout_s=timeout_s)

    monkeypatch.setattr(driver, "connected", note)
    async with guests_of(host, 2) as paths:
        hypervisor = QemuHypervisor(host, "host-a")
        seen = await hypervisor.guests()
        assert sorted(asked) == sorted(one.qmp for one in paths)
        asked.clear()
        guest = await hypervisor.open_guest(seen[1].guest_id)
        await guest.release()
        assert [monitor.stem for monitor in asked] == [seen[1].guest_id]


async def test_a_guest_that_has_ended_since_it_was_seen_is_unknown(host: QemuHost) -> None:
    hypervisor = QemuHypervisor(host, "host-a")
    async with guests_of(host, 1):
        (seen,) = await hypervisor.guests()
    with pytest.raises(GuestUnknown):
        await hypervisor.open_guest(seen.guest_id)


async def test_a_guest_that_was_started_since_then_is_found(host: QemuHost) -> None:
    hypervisor = QemuHypervisor(host, "host-a")
    assert await hypervisor.guests() == []
    async with guests_of(host, 1) as (paths,):
        guest = await hypervisor.open_guest(paths.qmp.stem)
        await guest.release()


async def test_a_qemu_that_does_not_say_what_it_can_do_is_held_against_every_guest(
    host: QemuHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the findings would be of machines and CPU models that are missing, with a remedy that does not help."""
    binary = tmp_path / "qemu"
    binary.write_text("#!/bin/sh\nexec sleep 60\n")
    binary.chmod(0o755)
    monkeypatch.setattr(hostmodels, "START_TIMEOUT_S", 0.1)
    hypervisor = QemuHypervisor(replace(host, binary=binary), "host-b")
    guest = facts_of(PLAIN, CpuFacts(model="Nehalem", features=()), None, is_running=True)
    assert (await hypervisor.host_facts(guest)).machines == ()
    (objection,) = await hypervisor.objections(guest)
    assert objection.check == "hypervisor-binary"
    assert "did not say within 0.1 s what it can do with tcg" in objection.found
    # The next guest asks again.
    binary.unlink()
    binary.symlink_to(QEMU)
    monkeypatch.undo()
    assert (await hypervisor.host_facts(guest)).machines
    assert await hypervisor.objections(guest) == ()
