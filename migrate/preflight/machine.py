"""The machine that the guest is: its hypervisor and versions, its firmware and NUMA nodes, and the hosts' clocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from migrate.preflight import firmware
from migrate.preflight.evidence import MAX_NAMED, Inspection
from migrate.preflight.report import Check, Finding

__all__ = [
    "CHECKS",
    "CLOCK",
    "HYPERVISOR",
    "HYPERVISOR_VERSION",
    "MACHINE",
    "MAX_DRIFT_S",
    "MAX_MAJORS_AHEAD",
    "NUMA",
    "judge",
]

HYPERVISOR: Final = Check(
    check_id="hypervisor",
    asked="Does the destination run guests of this hypervisor?",
    why="A guest's device state can be loaded by the hypervisor that saved it only",
    remedy="Enable [guests.KIND] in the destination's configuration",
)
MACHINE: Final = Check(
    check_id="machine",
    asked="Does the destination's hypervisor know the guest's machine type?",
    why="The type fixes what hardware the guest sees; another one would change under a running system",
    remedy="Upgrade the hypervisor of the destination, or start the guest with a type that both know",
)
HYPERVISOR_VERSION: Final = Check(
    check_id="hypervisor-version",
    asked="Is the destination's hypervisor no older than the one that runs the guest?",
    why="A release writes device state that older ones cannot read; newer ones read what older ones wrote",
    remedy="Upgrade the hypervisor of the destination first",
)
NUMA: Final = Check(
    check_id="numa",
    asked="Has the destination the NUMA nodes that the guest's RAM is bound to?",
    why="RAM that should be near a vCPU's core lies elsewhere after the move, and is slower",
    remedy="Move it to a host of the same shape, or start it without a binding to nodes of its host",
)
CLOCK: Final = Check(
    check_id="clock",
    asked="Do the clocks of the two hosts agree?",
    why="A guest's real-time clock follows its host's: it would see time jump, and its leases and logs with it",
    remedy="Run chrony or another time service on both hosts",
)
CHECKS: Final = (HYPERVISOR, HYPERVISOR_VERSION, MACHINE, firmware.FIRMWARE, NUMA, CLOCK)

# Of a release, what is compared: 7.2.22 and 7.2.1 write the same state.
_RELEASE: Final = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})(\.[0-9]{1,6}){0,2}")
# QEMU has one major version a year and keeps a machine type for six; two of them apart are still tried by distributions
# that let a host skip a release.
MAX_MAJORS_AHEAD: Final = 2
# An NTP client keeps hosts within milliseconds; below a second nobody's software notices a step.
WARN_DRIFT_S: Final = 1.0
# Longer than any time service leaves a host wrong; tickets, leases and logs are wrong from here on.
MAX_DRIFT_S: Final = 10.0


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge hypervisor, machine type and clocks."""
    guest, host = inspection.guest, inspection.host
    yield _clock(inspection)
    if guest.hypervisor != host.hypervisor:
        yield HYPERVISOR.refused(
            f"{guest.name} is a guest of {guest.hypervisor}, which {host.name} does not run",
            f"Enable [guests.{guest.hypervisor}] in the configuration of {host.name}",
        )
        return
    yield HYPERVISOR.ok(f"{host.name} runs {host.hypervisor} guests")
    yield _version(inspection)
    yield _machine(inspection)
    yield from firmware.judge(inspection)
    yield _numa(inspection)


def _machine(inspection: Inspection) -> Finding:
    guest, host = inspection.guest, inspection.host
    if not guest.machine:
        return MACHINE.unknown(f"the machine type of {guest.name} is not known")
    if guest.machine in host.hardware.deprecated_machines:
        return MACHINE.warning(
            f"{host.name} knows the machine {guest.machine}, and will not for long: it is deprecated there",
            "Start the guest with a newer machine type when it can be shut down",
        )
    if guest.machine in host.machines:
        return MACHINE.ok(f"{host.name} knows the machine {guest.machine}")
    if not host.machines:
        return MACHINE.refused(
            f"{guest.name} is a machine of type {guest.machine}, and {host.name} names none that it knows",
            f"See what {host.name} says of its hypervisor",
        )
    known = ", ".join(host.machines[-MAX_NAMED:])
    return MACHINE.refused(
        f"{guest.name} is a machine of type {guest.machine}, which {host.name} does not know: it knows {known}",
        f"Upgrade the hypervisor of {host.name}, or start the guest with one of those types",
    )


def _version(inspection: Inspection) -> Finding:
    guest, host = inspection.guest, inspection.host
    here, there = _RELEASE.fullmatch(guest.hardware.version), _RELEASE.fullmatch(host.hardware.version)
    found = (
        f"{guest.name} runs in {guest.hypervisor} {guest.hardware.version or 'of an unknown version'}, "
        f"{host.name} has {host.hardware.version[:40] or 'an unknown one'}"
    )
    if here is None or there is None:
        return HYPERVISOR_VERSION.unknown(found, "Compare the versions by hand")
    if (int(there[1]), int(there[2])) < (int(here[1]), int(here[2])):
        return HYPERVISOR_VERSION.refused(found)
    if int(there[1]) - int(here[1]) > MAX_MAJORS_AHEAD:
        return HYPERVISOR_VERSION.warning(
            f"{found}: more than {MAX_MAJORS_AHEAD} major versions ahead",
            "Try it with a guest that does not matter, or move by way of a host between the two",
        )
    return HYPERVISOR_VERSION.ok(found)


def _numa(inspection: Inspection) -> Finding:
    guest, host = inspection.guest, inspection.host
    wanted, there = guest.hardware.memory_nodes, host.hardware.memory_nodes
    if not wanted:
        return NUMA.ok(f"{guest.name} is bound to no node of its host")
    if not there:
        return NUMA.unknown(f"{host.name} does not say what NUMA nodes it has")
    missing = [str(node) for node in wanted if node not in there]
    if missing:
        return NUMA.warning(
            f"{guest.name} is bound to node {', '.join(missing[:MAX_NAMED])} of {inspection.source_host}, and "
            f"{host.name} has {len(there)} nodes"
        )
    return NUMA.ok(f"{host.name} has the {len(wanted)} nodes that {guest.name} is bound to")


def _clock(inspection: Inspection) -> Finding:
    """The destination read its clock at some moment while the source waited for the answer."""
    ahead_s = inspection.there.at_s - inspection.here.at_s
    # What the wait cannot explain: the least drift that there can be.
    drift_s = max(-ahead_s, ahead_s - inspection.answer_s, 0.0)
    host, source = inspection.host.name, inspection.source_host
    if drift_s <= WARN_DRIFT_S:
        return CLOCK.ok(
            f"the clocks of {source} and {host} agree to {max(drift_s, inspection.answer_s):.3f} s"
        )
    which = "behind" if ahead_s < 0 else "ahead of"
    found = f"the clock of {host} is {drift_s:.1f} s {which} that of {source}"
    return CLOCK.refused(found) if drift_s > MAX_DRIFT_S else CLOCK.warning(found)
