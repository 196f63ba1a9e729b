"""Hosts that do not fit each other, whatever the guest is made of."""

from __future__ import annotations

import uuid

from agents.api import CheckReport
from tests.agents.hypervisors.qemu.conftest import QEMU
from tests.needs import need_file
from tests.preflight.cases import fits, problem, warned
from tests.preflight.stage import Build


def faked(offset: str) -> list[str]:
    """What a command begins with whose wall clock is wrong by so much."""
    library = need_file("faketime", "/usr/lib/*/faketime/libfaketime.so.1")
    return ["env", f"LD_PRELOAD={library}", f"FAKETIME={offset}", "FAKETIME_DONT_FAKE_MONOTONIC=1"]


@fits
async def an_embedded_guest_and_two_hosts_alike(build: Build) -> CheckReport:
    async with build() as stage:
        return await stage.check(await stage.embedded())


@fits
async def a_qemu_guest_and_two_hosts_alike(build: Build) -> CheckReport:
    async with build(qemu="\n") as stage:
        return await stage.check(await stage.qemu())


@fits
async def a_guest_without_a_disk(build: Build) -> CheckReport:
    async with build() as stage:
        return await stage.check(await stage.embedded(disk_path=None))


@problem("hypervisor")
async def a_host_that_does_not_run_qemu(build: Build) -> CheckReport:
    async with build(qemu={"host-a": "\n"}) as stage:
        return await stage.check(await stage.qemu())


@problem("accelerator")
async def an_accelerator_that_is_not_allowed_there(build: Build) -> CheckReport:
    async with build(qemu={"host-a": "\n", "host-b": 'accels = ["kvm"]\n'}) as stage:
        return await stage.check(await stage.qemu())


@problem("hypervisor-binary", "machine", "cpu-model")
async def a_host_where_qemu_was_removed(build: Build) -> CheckReport:
    binary = build.folder / "qemu"
    binary.symlink_to(QEMU)
    async with build(qemu={"host-a": "\n", "host-b": f'binary = "{binary}"\n'}) as stage:
        binary.unlink()
        return await stage.check(await stage.qemu())


@problem("identity")
async def a_guest_of_the_same_identity_there(build: Build) -> CheckReport:
    async with build() as stage:
        guest_id = str(uuid.uuid4())
        await stage.embedded("host-b", guest_id=guest_id)
        return await stage.check(await stage.embedded(guest_id=guest_id))


@problem("identity")
async def a_qemu_guest_of_the_same_identity_there(build: Build) -> CheckReport:
    async with build(qemu="\n") as stage:
        guest_id = str(uuid.uuid4())
        await stage.qemu("host-b", guest_id=guest_id)
        return await stage.check(await stage.qemu(guest_id=guest_id))


@problem("clock")
async def a_clock_that_is_a_minute_ahead(build: Build) -> CheckReport:
    async with build(prefixes={"host-b": faked("+60s")}) as stage:
        return await stage.check(await stage.embedded())


@problem("clock")
async def a_clock_that_is_a_minute_behind(build: Build) -> CheckReport:
    # Its certificate is younger than that: it is the source's clock that is ahead.
    async with build(prefixes={"host-a": faked("+60s")}) as stage:
        return await stage.check(await stage.embedded())


@warned("clock")
async def a_clock_that_is_three_seconds_ahead(build: Build) -> CheckReport:
    async with build(prefixes={"host-b": faked("+3s")}) as stage:
        return await stage.check(await stage.embedded())


@problem("storage", "disk-content", "disk-access", "ownership")
async def a_storage_that_is_not_shared(build: Build) -> CheckReport:
    other = build.folder / "other"
    other.mkdir()
    async with build(shared_at={"host-b": other}) as stage:
        return await stage.check(await stage.embedded())


@problem("memory", "identity", "accelerator")
async def three_problems_at_once(build: Build) -> CheckReport:
    there = 'memory_limit = "128MiB"\naccels = ["kvm"]\n'
    async with build(qemu={"host-a": "\n", "host-b": there}) as stage:
        guest_id = str(uuid.uuid4())
        await stage.qemu("host-b", guest_id=guest_id)
        return await stage.check(await stage.qemu(guest_id=guest_id))
