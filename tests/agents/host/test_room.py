"""Two agents that have no room, are full, end, or are not allowed to: the check says it, and the move is not begun."""

from __future__ import annotations

import os
import resource
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from agents.api import Check, CheckReport, Move, Refused, SetLimits
from migrate.phases import Phase
from migrate.preflight import Finding, Severity
from tests.agents.host.conftest import AgentLog
from tests.agents.host.fleet import ALLOW_ALL, HOSTS, NOISE, SLOW, Fleet, in_precopy, report_of, running_fleet
from tests.agents.host.qemu_guests import qemu_fleet
from tests.agents.hypervisors.qemu.conftest import needs_qemu
from tests.agents.survey.trees import host
from tests.transport.certificates import Authority

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt,
]

HOST_BYTES = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
LOOKS_ONLY = ALLOW_ALL.replace('"view", "move", "resolve"', '"view"')


async def check(fleet: Fleet, guest: str = "worker") -> tuple[Finding, ...]:
    report = await fleet.ask("host-a", Check(guest=guest, to="host-b"))
    if not isinstance(report, CheckReport):
        raise AssertionError(report)
    return report.findings


def of(severity: Severity, findings: tuple[Finding, ...]) -> dict[str, str]:
    return {f.check: f.found for f in findings if f.severity is severity}


async def refused(fleet: Fleet, guest: str = "worker") -> dict[str, str]:
    """What a check refuses; the move is refused for the same, and the guest stays."""
    findings = await check(fleet, guest)
    report = report_of(await fleet.move(guest, "host-a", "host-b"))
    assert (report.phase, report.runs_on) == (Phase.ROLLED_BACK, "host-a")
    # What is free or left changes meanwhile, what to do does not.
    assert all(f.remedy in (report.error or "") for f in findings if f.severity is Severity.REFUSED)
    return of(Severity.REFUSED, findings)


async def test_a_host_that_has_promised_its_memory_takes_no_guest_though_it_is_free(folder: Path) -> None:
    async with running_fleet(folder, "memory_overcommit = 0.1") as fleet:
        fleet.start_guest("host-a")
        # Nothing of it is used: it is a promise.
        fleet.start_guest("host-b", name="large", ram_bytes=HOST_BYTES // 10 >> 20 << 20, fill_bytes=0)
        assert set(await refused(fleet)) == {"memory-overcommit"}


@pytest.mark.skipif(HOST_BYTES > 60 << 30, reason="no embedded guest is larger than this host")
async def test_a_guest_that_is_larger_than_the_host_never_fits(folder: Path) -> None:
    async with running_fleet(folder, "memory_overcommit = 16") as fleet:
        fleet.start_guest("host-a", ram_bytes=(HOST_BYTES >> 20) + 1 << 20, fill_bytes=0)
        assert set(await refused(fleet)) == {"memory-physical", "memory"}


async def test_vcpus_are_promised_as_the_configuration_says(folder: Path) -> None:
    cpus = os.sysconf("SC_NPROCESSORS_ONLN")
    async with running_fleet(folder, f"cpu_overcommit = {1.5 / cpus}") as fleet:
        fleet.start_guest("host-a")
        assert of(Severity.REFUSED, await check(fleet)) == {}
        fleet.start_guest("host-b", name="other")
        assert set(await refused(fleet)) == {"cpu-overcommit"}


async def test_hosts_that_are_full_say_so_before_anything_is_asked_of_them(folder: Path) -> None:
    async with running_fleet(folder, "incoming = 1\noutgoing = 1") as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        fleet.start_guest("host-a", name="late")
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        found = of(Severity.REFUSED, await check(fleet, "late"))
        assert set(found) == {"incoming-limit", "outgoing-limit"}
        assert "the limit is 1 ([limits] incoming)" in found["incoming-limit"]
        # What was let in is examined again before it is stopped, and is not one too many for itself.
        await fleet.ask("host-a", SetLimits(job=job, bandwidth_bytes_per_s=0))
        assert (await fleet.follow("host-a", job)).phase is Phase.COMPLETE
        await fleet.check_runs_only_at("host-b", guest)
        assert of(Severity.REFUSED, await check(fleet, "late")) == {}


@pytest.mark.parametrize("draining", ["host-a", "host-b"])
async def test_an_agent_that_ends_says_so_and_finishes_what_was_let_in(folder: Path, draining: str) -> None:
    async with running_fleet(folder) as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        fleet.start_guest("host-a", name="late")
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        fleet.agents[draining].ask_to_end()
        with anyio.fail_after(5):
            while await fleet.page(draining, "/healthz") != (503, "draining\n"):
                await anyio.lowlevel.checkpoint()
        assert set(of(Severity.REFUSED, await check(fleet, "late"))) == {"draining"}
        async with fleet.operator("host-a") as channel:  # held open over the end
            await channel.send(SetLimits(job=job, bandwidth_bytes_per_s=0))
            await channel.receive()
            with anyio.fail_after(20):
                await fleet.has_ended[draining].wait()
        await fleet.check_runs_only_at("host-b", guest)


async def test_who_may_only_look_learns_that_the_move_would_be_refused(folder: Path) -> None:
    async with running_fleet(folder, rules=LOOKS_ONLY) as fleet:
        fleet.start_guest("host-a")
        found = of(Severity.REFUSED, await check(fleet))
        answer = await fleet.ask("host-a", Move(guest="worker", to="host-b"))
        assert isinstance(answer, Refused)
        assert found == {"allowed": answer.text}


async def test_certificates_that_end_soon_are_said_for_each_end(folder: Path, agent_log: AgentLog) -> None:
    issued = folder / "own"
    issued.mkdir()
    authority = Authority(issued, "fleet")
    async with running_fleet(
        folder, authority=authority, valid_for={"host-b": timedelta(minutes=30)}
    ) as fleet:
        fleet.start_guest("host-a")
        # That of host-a and that of the CA have a day to go, which is worth a warning.
        findings = await check(fleet)
        assert "host-a ends in 2" in of(Severity.WARNING, findings)["certificates"]
        assert "host-b ends in 30 min" in (await refused(fleet))["certificates"]
        # A new certificate mends it without a restart.
        fleet.issue_from(authority)
        agent_log.lines.clear()
        fleet.agents["host-b"].reload()
        await agent_log.until("certificates read again")
        assert of(Severity.REFUSED, await check(fleet)) == {}


async def test_what_the_kernels_say_is_what_the_check_says(folder: Path) -> None:
    """Both kernels are made up: machines under test have neither SELinux nor AppArmor, and swap nothing."""
    roots = {name: host(folder / f"root-{name}") for name in HOSTS}
    for root in roots.values():
        root.write("sys/fs/selinux/enforce", "1")
        root.write("sys/module/apparmor/parameters/enabled", "Y\n")
        root.write("sys/kernel/security/apparmor/profiles", "somebody-else (enforce)\n")
        root.write("proc/self/attr/current", "system_u:system_r:svirt_t:s0\0")
    roots["host-a"].write("etc/selinux/config", "SELINUXTYPE=targeted\n")
    roots["host-b"].write("etc/selinux/config", "SELINUXTYPE=mls\n")
    roots["host-b"].write("proc/loadavg", "9.00 9.00 9.00 4/127 9896\n")
    # 8 GiB of memory there, but no more than 32 MiB for the agent and its guests.
    roots["host-b"].write("sys/fs/cgroup/agents/memory.max", f"{32 << 20}\n")
    async with running_fleet(folder, roots={name: root.folder for name, root in roots.items()}) as fleet:
        guest = fleet.start_guest("host-a").guest_id
        pid = fleet.describe("host-a", guest).pid
        roots["host-a"].write(f"proc/{pid}/attr/current", "system_u:system_r:svirt_t:s0:c1,c2\0")
        roots["host-a"].write(f"proc/{pid}/attr/apparmor/current", f"libvirt-{guest} (enforce)\n")
        found = await refused(fleet)
        assert set(found) == {"selinux", "apparmor", "memory-physical", "memory-overcommit"}
        assert "svirt_t:s0:c1,c2" in found["selinux"]
        assert f"libvirt-{guest}" in found["apparmor"]
        warnings = of(Severity.WARNING, await check(fleet))
        assert set(warnings) == {"load", "pressure"}
        # Mended, one after the other.
        roots["host-b"].write("etc/selinux/config", "SELINUXTYPE=targeted\n")
        roots["host-b"].write("sys/kernel/security/apparmor/profiles", f"libvirt-{guest} (enforce)\n")
        roots["host-b"].write("sys/fs/cgroup/agents/memory.max", "max\n")
        assert of(Severity.REFUSED, await check(fleet)) == {}


@needs_qemu()
async def test_a_qemu_guest_says_its_vcpus_its_balloon_and_what_confines_it(folder: Path) -> None:
    cpus = os.sysconf("SC_NPROCESSORS_ONLN")
    async with qemu_fleet(folder) as guests:
        spec = guests.spec(vcpus=cpus + 1, has_balloon=True)
        await guests.start("host-a", spec)
        async with guests.monitor("host-a", spec) as qmp:
            # No guest under test has a driver for it: it stays as it was, at all of the RAM.
            actual = await qmp.execute("query-balloon")
        assert actual == {"actual": spec.ram_bytes}
        findings = await check(guests.fleet)
        assert of(Severity.REFUSED, findings) == {}
        assert f"has {cpus + 1} vCPUs" in of(Severity.WARNING, findings)["vcpus"]
        fine = of(Severity.OK, findings)
        assert f"leaves it {spec.ram_bytes >> 20} MiB of {spec.ram_bytes >> 20} MiB" in fine["balloon"]
        assert "can be read" in fine["confidential"]
        await guests.check_runs("host-a", spec)
