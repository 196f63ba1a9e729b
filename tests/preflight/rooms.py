"""Hosts without room, that take no guest now, or that do not allow it; and kernels that confine guests."""

from __future__ import annotations

import os
import resource
from datetime import timedelta

import anyio
import anyio.lowlevel

from agents.api import CheckReport
from agents.hypervisors.qemu.spec import MemorySpec
from tests.agents.host.fleet import ALLOW_ALL, HOSTS, NOISE, SLOW, in_precopy
from tests.agents.survey.trees import Root, host
from tests.preflight.cases import fits, problem, warned
from tests.preflight.stage import Build, Stage
from tests.transport.certificates import Authority

HOST_BYTES = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
CPUS = os.sysconf("SC_NPROCESSORS_ONLN")


def roots(build: Build) -> dict[str, Root]:
    """Kernels of two hosts of 8 GiB, in directories, that are in order."""
    made = {name: host(build.folder / f"root-{name}") for name in HOSTS}
    for root in made.values():
        root.write("proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
        root.write("proc/self/attr/current", "system_u:system_r:svirt_t:s0\0")
    return made


def confined(root: Root, *, policy: str = "targeted", profiles: str = "") -> None:
    root.write("sys/fs/selinux/enforce", "1")
    root.write("etc/selinux/config", f"SELINUXTYPE={policy}\n")
    root.write("sys/module/apparmor/parameters/enabled", "Y\n")
    root.write("sys/kernel/security/apparmor/profiles", profiles)


def folders(made: dict[str, Root]) -> dict[str, object]:
    return {"roots": {name: root.folder for name, root in made.items()}}


async def another_leaves(stage: Stage) -> None:
    """Have another guest on its way from host-a to host-b, for as long as the case lasts."""
    await stage.embedded("host-a", **NOISE)
    job = await stage.fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
    await stage.fleet.until("host-a", job, in_precopy)


async def labelled(stage: Stage, made: dict[str, Root]) -> str:
    """Start a guest that SELinux has given categories of its own; give its identity."""
    guest = await stage.embedded()
    label = "system_u:system_r:svirt_t:s0:c1,c2\0"
    made["host-a"].write(f"proc/{stage.fleet.describe('host-a', guest).pid}/attr/current", label)
    return guest


@problem("memory")
async def too_little_memory_is_free_there(build: Build) -> CheckReport:
    async with build(embedded={"host-b": 'memory_limit = "64MiB"\n'}) as stage:
        return await stage.check(await stage.embedded())


@problem("memory")
async def too_little_memory_is_free_there_for_a_qemu_guest(build: Build) -> CheckReport:
    async with build(qemu={"host-a": "\n", "host-b": 'memory_limit = "128MiB"\n'}) as stage:
        return await stage.check(await stage.qemu())


@problem("memory-overcommit")
async def memory_that_is_free_and_promised(build: Build) -> CheckReport:
    async with build(limits={"host-b": "memory_overcommit = 0.1"}) as stage:
        await stage.embedded("host-b", name="large", ram_bytes=HOST_BYTES // 10 >> 20 << 20, fill_bytes=0)
        return await stage.check(await stage.embedded())


@problem("memory-physical", "memory-overcommit", "memory")
async def a_guest_that_is_larger_than_the_host(build: Build) -> CheckReport:
    large = (MemorySpec(name="ram0", size_bytes=(HOST_BYTES >> 20) + 1 << 20),)
    async with build(qemu="\n") as stage:
        return await stage.check(await stage.qemu(memories=large))


@problem("cpu-overcommit")
async def more_vcpus_than_may_be_promised(build: Build) -> CheckReport:
    async with build(limits={"host-b": f"cpu_overcommit = {1.5 / CPUS}"}) as stage:
        await stage.embedded("host-b", name="other")
        return await stage.check(await stage.embedded())


@warned("vcpus")
async def more_vcpus_than_the_host_has_cpus(build: Build) -> CheckReport:
    async with build(qemu="\n") as stage:
        return await stage.check(await stage.qemu(vcpus=CPUS + 1))


@problem("incoming-limit")
async def a_destination_that_takes_as_many_as_it_may(build: Build) -> CheckReport:
    async with build(limits={"host-b": "incoming = 1"}) as stage:
        await another_leaves(stage)
        return await stage.check(await stage.embedded(name="late"))


@problem("outgoing-limit")
async def a_source_that_sends_as_many_as_it_may(build: Build) -> CheckReport:
    async with build(limits={"host-a": "outgoing = 1"}) as stage:
        await another_leaves(stage)
        return await stage.check(await stage.embedded(name="late"))


@problem("draining")
async def a_destination_that_is_being_shut_down(build: Build) -> CheckReport:
    async with build() as stage:
        await another_leaves(stage)
        stage.fleet.agents["host-b"].ask_to_end()
        with anyio.fail_after(5):
            while await stage.fleet.page("host-b", "/healthz") != (503, "draining\n"):
                await anyio.lowlevel.checkpoint()
        return await stage.check(await stage.embedded(name="late"))


@problem("allowed")
async def somebody_who_may_only_look(build: Build) -> CheckReport:
    async with build(rules=ALLOW_ALL.replace('"view", "move", "resolve"', '"view"')) as stage:
        return await stage.check(await stage.embedded())


@problem("allowed")
async def a_source_that_may_send_no_guests_there(build: Build) -> CheckReport:
    async with build(rules=ALLOW_ALL.replace('agents = ["*"]', 'agents = ["host-c"]')) as stage:
        return await stage.check(await stage.embedded())


@fits
async def somebody_who_may_move_this_guest_alone(build: Build) -> CheckReport:
    rules = ALLOW_ALL.replace(
        'may = ["view", "move", "resolve"]', 'may = ["view", "move"]\nguests = ["work*"]'
    )
    async with build(rules=rules) as stage:
        return await stage.check(await stage.embedded())


@problem("certificates")
async def a_certificate_that_ends_within_the_hour(build: Build) -> CheckReport:
    issued = build.folder / "own"
    issued.mkdir()
    ends = {"host-b": timedelta(minutes=30)}
    async with build(authority=Authority(issued, "fleet"), valid_for=ends) as stage:
        return await stage.check(await stage.embedded())


@warned("certificates")
async def certificates_that_end_within_days(build: Build) -> CheckReport:
    issued = build.folder / "own"
    issued.mkdir()
    async with build(authority=Authority(issued, "fleet")) as stage:
        return await stage.check(await stage.embedded())


@fits
async def hosts_with_selinux_and_a_guest_of_a_category_of_its_own(build: Build) -> CheckReport:
    made = roots(build)
    for root in made.values():
        confined(root)
    async with build(**folders(made)) as stage:
        return await stage.check(await labelled(stage, made))


@problem("selinux")
async def a_label_of_another_policy(build: Build) -> CheckReport:
    made = roots(build)
    confined(made["host-a"])
    confined(made["host-b"], policy="mls")
    async with build(**folders(made)) as stage:
        return await stage.check(await labelled(stage, made))


@problem("apparmor")
async def a_profile_that_is_not_loaded_there(build: Build) -> CheckReport:
    made = roots(build)
    for root in made.values():
        confined(root, profiles="somebody-else (enforce)\n")
    async with build(**folders(made)) as stage:
        guest = await stage.embedded()
        pid = stage.fleet.describe("host-a", guest).pid
        made["host-a"].write(f"proc/{pid}/attr/apparmor/current", f"libvirt-{guest} (enforce)\n")
        return await stage.check(guest)


@problem("memory-physical", "memory-overcommit")
async def a_control_group_that_is_smaller_than_the_guest(build: Build) -> CheckReport:
    made = roots(build)
    made["host-b"].write("sys/fs/cgroup/agents/memory.max", f"{32 << 20}\n")
    async with build(**folders(made)) as stage:
        return await stage.check(await stage.embedded())


@warned("load")
async def a_host_whose_cpus_are_busy(build: Build) -> CheckReport:
    made = roots(build)
    made["host-b"].write("proc/loadavg", "9.00 9.00 9.00 4/127 9896\n")
    async with build(**folders(made)) as stage:
        return await stage.check(await stage.embedded())


@warned("pressure")
async def a_host_that_lacks_memory_by_its_kernel_s_word(build: Build) -> CheckReport:
    made = roots(build)
    made["host-b"].write("proc/pressure/memory", "some avg10=9.00 avg60=42.00 avg300=1.00 total=123\n")
    async with build(**folders(made)) as stage:
        return await stage.check(await stage.embedded())
