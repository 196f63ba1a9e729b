"""What stands against a QEMU guest that a person started, provoked for real: all of it in one report."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from agents.api import Check, CheckReport
from migrate.preflight import Finding, Severity
from tests.agents.host.fleet import Fleet, running_fleet
from tests.agents.hypervisors.qemu.conftest import QEMU, needs_qemu

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    needs_qemu(),
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),
]


class ByHand:
    """QEMU processes that nobody told vmferry of; they run their firmware and nothing else."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.pids: list[Path] = []

    async def start(self, host: str, *more: str, name: str = "web1", machine: str = "pc-q35-7.2") -> str:
        """Start one of 64 MiB, with more arguments; give its identity."""
        folder = self.fleet.qemu_dir(host)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        guest_id = str(uuid.uuid4())
        pid = folder / f"{name}.pid"
        self.pids.append(pid)
        await anyio.run_process(
            [
                *(str(QEMU), "-name", name, "-uuid", guest_id, "-cpu", "Nehalem", "-m", "64M"),
                *("-machine", f"{machine},accel=tcg,memory-backend=ram0", "-nodefaults", "-display", "none"),
                *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on", "-serial", "null"),
                *("-qmp", f"unix:{folder / name}.qmp,server=on,wait=off", "-daemonize", "-pidfile", str(pid)),
                *more,
            ]
        )
        return guest_id

    def end_all(self) -> None:
        for path in self.pids:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)


@asynccontextmanager
async def by_hand(folder: Path, qemu: str = "\n") -> AsyncIterator[ByHand]:
    async with running_fleet(folder, qemu=qemu) as fleet:
        guests = ByHand(fleet)
        try:
            yield guests
        finally:
            guests.end_all()


async def findings_of(guests: ByHand, guest: str, to: str = "host-b") -> list[Finding]:
    """All findings of a check, which must have one at least for every check that there is."""
    source = "host-a" if to == "host-b" else "host-b"
    report = await guests.fleet.ask(source, Check(guest=guest, to=to))
    assert isinstance(report, CheckReport), report
    return list(report.findings)


def of(findings: list[Finding], severity: Severity) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in findings:
        if one.severity is severity:
            found.setdefault(one.check, []).append(one.found)
    return found


async def test_a_guest_that_can_move_is_proved_to(folder: Path) -> None:
    async with by_hand(folder) as guests:
        await guests.start(
            "host-a", "-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01", "-netdev", "user,id=n"
        )
        findings = await findings_of(guests, "web1")
        assert not of(findings, Severity.REFUSED), findings
        for one in findings:
            print(one.check, one.severity, one.found)


async def test_every_reason_against_a_guest_is_in_one_report(folder: Path) -> None:
    async with by_hand(folder) as guests:
        await guests.start(
            "host-a",
            *("-object", "memory-backend-memfd,id=sh,size=1M,share=on"),
            *("-device", "ivshmem-plain,memdev=sh,id=shm0", "-device", "qemu-xhci", "-device", "usb-tablet"),
            *("-rtc", "base=localtime", "-smbios", "type=1,product=x"),
        )
        findings = await findings_of(guests, "web1")
        for one in findings:
            print(one.check, one.severity, one.found)
