"""A QEMU guest that is pinged while it moves between two hosts, each a network namespace with a bridge of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from agents.hypervisors.qemu.spec import NetworkKind, NetworkSpec, QemuSpec
from migrate.phases import Phase
from tests.agents.host.fleet import HOSTS, Fleet, free_port
from tests.agents.host.processes import REPOSITORY, Processes
from tests.agents.host.qemu_guests import QemuGuests
from tests.agents.hypervisors.qemu.conftest import needs_qemu
from tests.agents.hypervisors.qemu.linux import Boot
from tests.networks import PLUG, ip, make_switch, need_networks, plug, tear_down
from tests.waiting import until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt("module"),
    needs_qemu(),
]

SWITCH, CLIENT, TAP, BRIDGE = "vmf-switch", "vmf-client", "vmf-tap0", "vmf-br0"
NETWORKS = {"host-a": "vmf-a", "host-b": "vmf-b"}
ADDRESSES = {"host-a": "10.77.0.2", "host-b": "10.77.0.3"}
HERE, CLIENT_ADDRESS, GUEST_ADDRESS = "10.77.0.1", "10.77.0.9", "10.77.0.50"
MAC = "52:54:00:77:00:50"
PINGER = f"""
ip link set lo up
ip addr add {GUEST_ADDRESS}/24 dev eth0
ip link set eth0 up
exec /bin/workload set=32 rate=10
"""
run_sync = anyio.to_thread.run_sync


@contextmanager
def network() -> Iterator[None]:
    """A switch here, and behind it a client and two hosts, each with a bridge and a tap for the guest."""
    need_networks("ping")
    spaces = {CLIENT: "vmf-c0", **{space: f"{space}0" for space in NETWORKS.values()}}
    tear_down(list(spaces), (*spaces.values(), SWITCH))
    try:
        make_switch(SWITCH, f"{HERE}/24")
        for space, cable in spaces.items():
            plug(space, cable, switch=SWITCH, address=f"{CLIENT_ADDRESS}/24" if space == CLIENT else "")
        for host, space in NETWORKS.items():
            ip("-n", space, "link", "add", BRIDGE, "type", "bridge")
            ip("-n", space, "link", "set", PLUG, "master", BRIDGE)
            ip("-n", space, "tuntap", "add", TAP, "mode", "tap")
            ip("-n", space, "link", "set", TAP, "master", BRIDGE, "up")
            ip("-n", space, "addr", "add", f"{ADDRESSES[host]}/24", "dev", BRIDGE)
            ip("-n", space, "link", "set", BRIDGE, "up")
        yield
    finally:
        tear_down(list(spaces), (*spaces.values(), SWITCH))


@contextmanager
def two_hosts(folder: Path, event_loop: str) -> Iterator[tuple[Processes, QemuGuests]]:
    """Two agents, each in its own network."""
    fleet = Fleet(folder, addresses=ADDRESSES)
    fleet.issue()
    ports = {host: free_port() for host in HOSTS}
    configs = {
        host: fleet.write_config(host, ports, event_loop=event_loop, qemu=f'taps = ["{TAP}"]')
        for host in HOSTS
    }
    prefixes = {host: ["ip", "netns", "exec", space] for host, space in NETWORKS.items()}
    processes = Processes(fleet, configs, prefixes=prefixes)
    guests = QemuGuests(fleet, Boot.at(folder / "boot"))
    try:
        processes.start(*HOSTS)
        yield processes, guests
    finally:
        guests.end_all()
        processes.end()


def start_in(processes: Processes, host: str, spec: QemuSpec, description: Path) -> None:
    """Start a guest as a person on that host would."""
    network = spec.networks[0]
    description.write_text(
        f'kind = "qemu"\nid = "{spec.guest_id}"\nname = "{spec.name}"\nmachine = "{spec.machine}"\naccel = "tcg"\n'
        f'cpu = "{spec.cpu}"\nmemory = "256MiB"\nkernel = "{spec.kernel}"\ninitrd = "{spec.initrd}"\n'
        f'append = "{spec.append}"\n[[networks]]\ntap = "{network.interface}"\nmac = "{network.mac}"\n'
    )
    subprocess.run(
        [
            *processes.prefixes[host],
            *(sys.executable, "-m", "agents.cli", "guest", "start", str(description)),
            *("--config", str(processes.configs[host])),
        ],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )


@contextmanager
def pinging(command: list[str], log: Path) -> Iterator[None]:
    """Ping until the block ends; what was said is in the log then."""
    with log.open("wb") as words, subprocess.Popen(command, stdout=words) as ping:
        try:
            yield
        finally:
            ping.send_signal(signal.SIGINT)
            ping.wait(10)


def count_answers(log: Path) -> int:
    return log.read_text().count(" bytes from ")


async def test_a_ping_goes_on_through_a_move_between_two_hosts(folder: Path, anyio_backend_name: str) -> None:
    with network(), two_hosts(folder, anyio_backend_name) as (processes, guests):
        spec = guests.spec(
            networks=(NetworkSpec(kind=NetworkKind.TAP, mac=MAC, interface=TAP),),
            initrd=guests.boot.initrd_with(PINGER, "virtio_pci", "virtio_net"),
            append="console=ttyS0 quiet",
        )
        guests.specs[spec.guest_id] = spec
        await run_sync(start_in, processes, "host-a", spec, folder / "pinged.toml")
        await run_sync(guests.console("host-a", spec).wait_beats, 3)
        command = ["ip", "netns", "exec", CLIENT, "ping", "-n", "-D", "-i", "0.02", "-W", "1", GUEST_ADDRESS]
        log = folder / "pings"
        with pinging(command, log):
            await until(lambda: count_answers(log) > 20, "answers")
            for source, to in (HOSTS, HOSTS[::-1], HOSTS):
                report = await guests.move(spec, source, to)
                await guests.check_moved(spec, report, source, to)
                # A fast machine moves it three times within two seconds.
                had = count_answers(log)
                await until(lambda: count_answers(log) > had + 50, "answers after the move")  # noqa: B023 - at once
        said = await run_sync(log.read_text)
        answers = [float(stamp) for stamp in re.findall(r"^\[([\d.]+)\] \d+ bytes from", said, re.MULTILINE)]
        asked = re.search(r"(\d+) packets transmitted, (\d+) received", said)
        assert asked is not None, said[-500:]
        lost = int(asked[1]) - int(asked[2])
        assert int(asked[2]) > 200
        # A downtime of some 20 ms costs one ping in 20 ms, or none; a switch that was not told would cost minutes.
        assert lost <= 15, asked[0]
        assert max(later - earlier for earlier, later in pairwise(answers)) < 0.5


async def test_a_tap_that_is_missing_at_the_destination_is_said_before_anything_moves(
    folder: Path, anyio_backend_name: str
) -> None:
    with network(), two_hosts(folder, anyio_backend_name) as (processes, guests):
        spec = guests.spec(
            networks=(NetworkSpec(kind=NetworkKind.TAP, mac=MAC, interface=TAP),),
            initrd=guests.boot.initrd_with(PINGER, "virtio_pci", "virtio_net"),
            append="console=ttyS0 quiet",
        )
        guests.specs[spec.guest_id] = spec
        await run_sync(start_in, processes, "host-a", spec, folder / "pinged.toml")
        ip("-n", NETWORKS["host-b"], "link", "del", TAP)
        report = await guests.move(spec, "host-a", "host-b")
        assert report.phase is Phase.ROLLED_BACK
        assert f"there is no tap {TAP} here" in (report.error or "")
        await guests.check_stayed(spec, report, "host-a", "host-b")
