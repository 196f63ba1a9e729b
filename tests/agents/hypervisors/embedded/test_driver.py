from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from anyio import to_thread

from agents.hypervisors.confinement import profile_of, selinux_label_of
from agents.hypervisors.embedded.client import GuestClient, start_guest
from agents.hypervisors.embedded.driver import EmbeddedHypervisor, EmbeddedIncomingGuest, EmbeddedRunningGuest
from agents.hypervisors.embedded.replay import replay
from agents.hypervisors.embedded.rundir import GuestPaths
from agents.hypervisors.embedded.spec import CPU_MODELS, EmbeddedSpec
from agents.hypervisors.embedded.tracking import FORCE_HOOK_VARIABLE
from agents.hypervisors.inhabitants import Inhabitant
from memory.dirty import probe_kernel
from memory.errors import TrackerError
from memory.layout import PAGE_BYTES
from memory.runs import Runs, expand, pages_in
from migrate.errors import GuestRefused, GuestUnknown
from migrate.facts import Confinement, GuestDemand, GuestFacts
from migrate.ports import GuestRam, Hypervisor, IncomingGuest, RunningGuest
from tests.agents.hypervisors.embedded.conftest import GUEST_ID, SpecMaker
from tests.waiting import until

# Each starts processes, which take 0.2 s each.
pytestmark = [pytest.mark.anyio, pytest.mark.slow]

METHODS = [
    "write-hook",
    pytest.param(
        "uffd-wp", marks=pytest.mark.skipif(not probe_kernel().uffd_wp, reason="no uffd-wp in this kernel")
    ),
]


@dataclass
class Hosts:
    """Two hosts with a guest on the first."""

    run_dir: Path
    spec: EmbeddedSpec
    a: EmbeddedHypervisor
    b: EmbeddedHypervisor

    def client(self, host: str) -> GuestClient:
        return GuestClient(GuestPaths.of_guest(self.run_dir / host, GUEST_ID).socket)

    async def facts(self) -> GuestFacts:
        (facts,) = await self.a.guests()
        return facts


@pytest.fixture
def hosts(run_dir: Path, make_spec: SpecMaker) -> Hosts:
    disk = run_dir / "disk"
    disk.write_bytes(bytes(128 * 512))
    spec = make_spec(disk_path=str(disk))
    start_guest(spec, run_dir / "a")
    return Hosts(
        run_dir,
        spec,
        EmbeddedHypervisor(run_dir / "a", "host-a"),
        EmbeddedHypervisor(run_dir / "b", "host-b"),
    )


def copy(source: GuestRam, destination: GuestRam, runs: Runs) -> None:
    pages = memoryview(bytearray(pages_in(runs) * PAGE_BYTES))
    source.gather(runs, pages)
    destination.scatter(runs, pages)


def all_pages(ram: GuestRam) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    pages = bytearray(ram.total_pages * PAGE_BYTES)
    ram.gather(np.array([[0, ram.total_pages]], np.int64), memoryview(pages))
    return np.frombuffer(pages, np.uint64).reshape(-1, PAGE_BYTES // 8)


@asynccontextmanager
async def moving(hosts: Hosts) -> AsyncIterator[tuple[EmbeddedRunningGuest, EmbeddedIncomingGuest]]:
    source = await hosts.a.open_guest(GUEST_ID)
    destination = await hosts.b.prepare_incoming(source.facts)
    try:
        yield source, destination
    finally:
        await source.release()
        await destination.release()


async def let_it_write(hosts: Hosts) -> None:
    """Wait until the guest wrote some hundred pages more."""
    with closing(hosts.client("a")) as client:
        aim = client.describe().pages_written + 300
        while await to_thread.run_sync(lambda: client.describe().pages_written) < aim:
            pass


async def state_of(guest: EmbeddedRunningGuest) -> bytes:
    parts: list[bytes] = []

    await guest.save_device_state(parts.append)
    return b"".join(parts)


@pytest.mark.parametrize("method", METHODS)
async def test_a_guest_moved_while_it_runs_equals_one_that_never_was(
    hosts: Hosts, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE_HOOK_VARIABLE, "1" if method == "write-hook" else "")
    async with moving(hosts) as (source, destination):
        assert source.tracker.method == method
        source.tracker.start()
        copy(source.ram, destination.ram, source.ram.populated_runs())
        for _ in range(2):
            await let_it_write(hosts)
            copy(source.ram, destination.ram, source.tracker.harvest())
        await source.pause()
        copy(source.ram, destination.ram, source.tracker.harvest())
        assert (all_pages(source.ram) == all_pages(destination.ram)).all()
        await destination.load_device_state(await state_of(source))
        await source.destroy()
        await destination.resume()
        assert await hosts.a.guests() == []
        with closing(hosts.client("b")) as client:
            moved_at = client.describe().instructions
            while (await to_thread.run_sync(client.describe)).instructions <= moved_at:
                pass
            client.pause()
            described = client.describe()
            outcome = client.fingerprint(), client.save_state()
    assert described.errors == 0
    assert outcome == await to_thread.run_sync(replay, hosts.spec, described.instructions)


@pytest.mark.parametrize("method", METHODS)
async def test_a_harvest_is_exactly_the_pages_that_changed(
    hosts: Hosts, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE_HOOK_VARIABLE, "1" if method == "write-hook" else "")
    guest = await hosts.a.open_guest(GUEST_ID)
    await guest.pause()
    guest.tracker.start()
    assert len(guest.tracker.harvest()) == 0
    before = all_pages(guest.ram)
    await guest.resume()
    await let_it_write(hosts)
    await guest.pause()
    changed = np.flatnonzero((before != all_pages(guest.ram)).any(axis=1))
    assert expand(guest.tracker.harvest()).tolist() == changed.tolist()
    assert len(guest.tracker.harvest()) == 0
    guest.tracker.stop()
    guest.tracker.stop()
    with pytest.raises(TrackerError):
        guest.tracker.harvest()
    guest.tracker.start()
    assert len(guest.tracker.harvest()) == 0
    await guest.release()


async def test_a_paused_guest_does_not_change_and_a_resumed_one_does(hosts: Hosts) -> None:
    guest = await hosts.a.open_guest(GUEST_ID)
    await guest.pause()
    before = all_pages(guest.ram), await state_of(guest)
    after = all_pages(guest.ram), await state_of(guest)
    assert (before[0] == after[0]).all()
    assert before[1] == after[1]
    await guest.resume()
    await let_it_write(hosts)
    assert (all_pages(guest.ram) != before[0]).any()
    await guest.release()
    await guest.release()
    assert (await hosts.facts()).is_running


async def test_an_incoming_guest_is_no_guest_until_it_has_run_there(hosts: Hosts) -> None:
    async with moving(hosts) as (source, destination):
        assert await hosts.b.guests() == []
        with pytest.raises(GuestUnknown, match="on its way"):
            await hosts.b.open_guest(GUEST_ID)
        with pytest.raises(GuestRefused, match="incoming"):
            await destination.resume()
        await source.pause()
        await destination.load_device_state(await state_of(source))
        assert await hosts.b.guests() == []
        left = await hosts.b.find_incoming(GUEST_ID)
        assert left is not None
        await left.release()
        await destination.resume()
        # Its RAM was not copied: it does not run for long, but it is a guest of that host now.
        assert [facts.guest_id for facts in await hosts.b.guests()] == [GUEST_ID]
        assert await hosts.b.find_incoming(GUEST_ID) is None


async def test_a_machine_without_device_state_is_not_found_again(hosts: Hosts) -> None:
    async with moving(hosts):
        assert await hosts.b.find_incoming(GUEST_ID) is None
        assert await hosts.b.find_incoming("no-such-guest") is None


async def test_state_of_another_machine_is_refused_and_the_source_is_as_before(hosts: Hosts) -> None:
    async with moving(hosts) as (source, destination):
        with pytest.raises(GuestRefused, match="msgpack"):
            await destination.load_device_state(b"\xc1garbage")
        with pytest.raises(GuestRefused):
            await destination.resume()
        await destination.destroy()
        await destination.destroy()
        await let_it_write(hosts)
        assert source.facts.guest_id == GUEST_ID
        assert not list((hosts.run_dir / "b").glob("*.sock"))


async def test_a_guest_that_is_there_already_is_not_prepared_twice(hosts: Hosts) -> None:
    facts = await hosts.facts()
    with pytest.raises(GuestRefused, match="already"):
        await hosts.a.prepare_incoming(facts)
    first = await hosts.b.prepare_incoming(facts)
    with pytest.raises(GuestRefused, match="already"):
        await hosts.b.prepare_incoming(facts)
    await first.destroy()
    second = await hosts.b.prepare_incoming(facts)
    await second.destroy()


async def test_hostile_facts_are_refused_before_a_process_is_started(hosts: Hosts) -> None:
    facts = await hosts.facts()
    other = "00000000-0000-4000-8000-000000000000"
    for hostile, cause in [
        (replace(facts, spec=b"\xc1"), "msgpack"),
        (replace(facts, guest_id=other), "do not fit"),
        (replace(facts, blocks=()), "do not fit"),
        (replace(facts, hypervisor="qemu"), "do not fit"),
        (replace(facts, spec=replace(hosts.spec, disk_path="/nowhere/disk").to_bytes()), "shared storage"),
    ]:
        with pytest.raises(GuestRefused, match=cause):
            await hosts.b.prepare_incoming(hostile)
    assert not (hosts.run_dir / "b").exists()


async def test_memory_is_given_up_to_the_limit_and_not_beyond(hosts: Hosts) -> None:
    facts = await hosts.facts()
    enough = EmbeddedHypervisor(hosts.run_dir / "b", "host-b", memory_limit_bytes=hosts.spec.ram_bytes)
    short = EmbeddedHypervisor(hosts.run_dir / "b", "host-b", memory_limit_bytes=hosts.spec.ram_bytes - 1)
    with pytest.raises(GuestRefused, match=r"host-b has \d+ bytes of memory free"):
        await short.prepare_incoming(facts)
    guest = await enough.prepare_incoming(facts)
    assert (await enough.host_facts()).free_memory_bytes == 0
    await guest.destroy()


async def test_the_host_tells_its_models_guests_and_memory(hosts: Hosts) -> None:
    facts = await hosts.a.host_facts()
    assert (facts.name, facts.hypervisor, facts.guest_ids) == ("host-a", "embedded", (GUEST_ID,))
    assert [cpu.model for cpu in facts.cpus] == list(CPU_MODELS)
    assert facts.free_memory_bytes > hosts.spec.ram_bytes
    guest = await hosts.facts()
    assert guest.cpu in facts.cpus
    assert guest.ram_bytes == hosts.spec.ram_bytes
    (disk,) = guest.disks
    assert (disk.path, disk.size_bytes, disk.is_read_only) == (hosts.spec.disk_path, 128 * 512, False)
    assert EmbeddedSpec.from_bytes(guest.spec) == hosts.spec


async def test_machines_that_wait_are_inhabitants_and_no_guests(hosts: Hosts) -> None:
    incoming = await hosts.b.prepare_incoming(await hosts.facts())
    for host, driver in (("a", hosts.a), ("b", hosts.b)):
        with closing(hosts.client(host)) as client:
            pid = client.pid
        (one,) = await driver.inhabitants()
        assert one == Inhabitant(guest_id=GUEST_ID, ram_bytes=hosts.spec.ram_bytes, vcpus=1, pid=pid)
    await incoming.destroy()
    assert await hosts.b.inhabitants() == ()


async def test_a_guest_that_is_open_says_what_it_takes_and_what_confines_it(hosts: Hosts) -> None:
    guest = await hosts.a.open_guest(GUEST_ID)
    assert guest.facts.demand == GuestDemand(vcpus=1)
    assert guest.facts.confinement == Confinement(
        selinux_label=selinux_label_of("self"), apparmor_profile=profile_of("self")
    )
    await guest.release()


async def test_a_guest_that_died_is_unknown_and_leaves_no_socket(hosts: Hosts) -> None:
    guest = await hosts.a.open_guest(GUEST_ID)
    guest.tracker.start()
    with closing(hosts.client("a")) as client:
        os.kill(client.pid, signal.SIGKILL)
        client.await_end()
    with pytest.raises(TrackerError):
        guest.tracker.harvest()
    with pytest.raises(GuestRefused, match="ended during"):
        await guest.pause()
    await guest.release()
    assert await hosts.a.guests() == []
    assert not list((hosts.run_dir / "a").glob("*.sock"))
    with pytest.raises(GuestUnknown):
        await hosts.a.open_guest(GUEST_ID)


async def test_a_guest_that_faulted_is_looked_at_and_says_why_it_cannot_be_moved(hosts: Hosts) -> None:
    guest = await hosts.a.open_guest(GUEST_ID)
    await guest.pause()
    guest.ram.scatter(np.array([[1, 1]], dtype=np.int64), memoryview(b"\x0f\x0b" * (PAGE_BYTES // 2)))
    guest.tracker.start()  # which makes the emulator read the program again
    await guest.resume()
    await guest.release()
    with closing(hosts.client("a")) as client:
        await until(lambda: client.describe().state == "faulted", "the fault")
    with pytest.raises(GuestRefused):
        await hosts.a.open_guest(GUEST_ID)
    seen = await hosts.a.inspect_guest(GUEST_ID)
    assert (seen.facts.name, seen.facts.ram_bytes) == (hosts.spec.name, hosts.spec.ram_bytes)
    (blocker,) = seen.facts.blockers
    assert "CPU stopped" in blocker
    await seen.release()


@pytest.mark.parametrize("guest_id", ["", "../a", "00000000-0000-4000-8000-000000000000"])
async def test_a_guest_that_is_not_here_is_unknown(run_dir: Path, guest_id: str) -> None:
    with pytest.raises(GuestUnknown, match="host-a"):
        await EmbeddedHypervisor(run_dir, "host-a").open_guest(guest_id)
    with pytest.raises(GuestUnknown, match="host-a"):
        await EmbeddedHypervisor(run_dir, "host-a").inspect_guest(guest_id)


async def test_the_driver_fits_the_port(run_dir: Path) -> None:
    # mypy is the test; at run time there is only this to say.
    driver: Hypervisor = EmbeddedHypervisor(run_dir, "host-a")
    running: type[RunningGuest] = EmbeddedRunningGuest
    incoming: type[IncomingGuest] = EmbeddedIncomingGuest
    assert (driver.name, running, incoming) == ("embedded", EmbeddedRunningGuest, EmbeddedIncomingGuest)
