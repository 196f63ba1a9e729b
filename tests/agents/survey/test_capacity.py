"""What is read of a host's room: from made-up kernels, and from this one's."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agents.config import LimitSettings
from agents.survey.capacity import CapacitySurveyor
from migrate.facts import CapacityFacts, MoveSlots
from tests.agents.survey.trees import Root, Tenants, host, machine
from tests.migrate.world import CAPACITY

HAS_PSI = Path("/proc/pressure/memory").exists()
pytestmark = pytest.mark.anyio

LIMITS = LimitSettings(
    outgoing=4,
    incoming=4,
    connections=1,
    window_bytes=4 << 20,
    delta_cache_bytes=0,
    bandwidth_bytes_per_s=None,
    outage_s=1.0,
    dead_peer_s=1.0,
    memory_overcommit=1.25,
    cpu_overcommit=3.0,
)


def slots(guest_id: str) -> MoveSlots:
    return replace(CAPACITY.moves, is_coming=guest_id == "coming", is_leaving=guest_id == "leaving")


async def survey(root: Path, *drivers: Tenants, guest_id: str = "it") -> CapacityFacts:
    return await CapacitySurveyor(LIMITS, drivers, slots, root=root).survey(guest_id)


async def test_all_of_a_host_is_read(tmp_path: Path) -> None:
    facts = await survey(host(tmp_path).folder, Tenants((machine("other"),)), guest_id="coming")
    assert facts == CapacityFacts(
        physical_bytes=8 << 30,
        swap_bytes=2 << 30,
        swap_free_bytes=1 << 30,
        online_cpus=6,
        load_5min=2.25,
        memory_pressure=12.5,
        cpu_pressure=0.0,
        promised_bytes=1 << 30,
        promised_vcpus=2,
        memory_overcommit=1.25,
        cpu_overcommit=3.0,
        moves=replace(CAPACITY.moves, is_coming=True),
    )


async def test_a_host_that_shows_nothing_gives_nothing_and_no_error(tmp_path: Path) -> None:
    facts = await survey(tmp_path)
    for name in ("physical_bytes", "swap_bytes", "swap_free_bytes", "online_cpus", "load_5min"):
        assert getattr(facts, name) is None
    assert (facts.memory_pressure, facts.cpu_pressure) == (None, None)


@pytest.mark.parametrize(
    "garbage", [b"", b"\0\xff\xfe", b"MemTotal:\nMemTotal: x kB\n", b"some avg60=\n", b"1 x 3"]
)
async def test_garbage_gives_nothing_and_no_error(tmp_path: Path, garbage: bytes) -> None:
    root = host(tmp_path)
    for path in (
        *("proc/meminfo", "proc/loadavg", "proc/pressure/memory", "proc/pressure/cpu", "proc/self/cgroup"),
        "sys/devices/system/cpu/online",
    ):
        root.write(path, garbage)
    facts = await survey(root.folder)
    assert (facts.physical_bytes, facts.online_cpus, facts.load_5min, facts.memory_pressure) == (None,) * 4


async def test_the_group_of_the_agent_bounds_what_its_guests_can_have(tmp_path: Path) -> None:
    root = host(tmp_path)
    root.write("sys/fs/cgroup/agents/memory.max", f"{2 << 30}\n")
    root.write("sys/fs/cgroup/agents/vmferry/memory.max", "max\n")
    assert (await survey(root.folder)).physical_bytes == 2 << 30


async def test_the_guest_s_own_machine_is_promised_nothing_twice(tmp_path: Path) -> None:
    drivers = Tenants((machine("it"), machine("other", vcpus=3))), Tenants((machine("third", 4096, 1),))
    facts = await survey(tmp_path, *drivers)
    assert (facts.promised_bytes, facts.promised_vcpus) == ((1 << 30) + 4096, 4)


async def test_where_the_guest_leaves_the_others_are_not_disturbed(tmp_path: Path) -> None:
    driver = Tenants((machine("other"),))
    facts = await survey(tmp_path, driver, guest_id="leaving")
    assert (facts.promised_bytes, facts.promised_vcpus, driver.questions) == (None, None, 0)


@pytest.mark.parametrize(
    ("online", "cpus"),
    [("0\n", 1), ("0-1\n", 2), ("0-3,5-7\n", 7), ("3-1\n", None), ("-\n", None), ("\n", None)],
)
async def test_a_list_of_cpus_is_counted(tmp_path: Path, online: str, cpus: int | None) -> None:
    Root(tmp_path).write("sys/devices/system/cpu/online", online)
    assert (await survey(tmp_path)).online_cpus == cpus


async def test_this_very_host_is_read_and_quickly() -> None:
    await survey(Path("/"))
    began_s = time.perf_counter()
    facts = await survey(Path("/"))
    assert time.perf_counter() - began_s < 1
    assert facts.online_cpus == os.sysconf("SC_NPROCESSORS_ONLN")
    assert facts.physical_bytes is not None
    assert 0 < facts.physical_bytes <= os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    assert facts.load_5min is not None
    assert abs(facts.load_5min - os.getloadavg()[1]) < 1
    if HAS_PSI:
        assert facts.memory_pressure is not None
        assert 0 <= facts.memory_pressure <= 100
