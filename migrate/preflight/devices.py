"""The guest's devices: what lets nobody move it, what ties each to its host, and what the destination has against them.

The objections are made by the destination's driver, which knows what its host allows and has; here they get the words
of their checks. An objection whose check is not known here is refused like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.facts import GuestFacts
from migrate.preflight import hardware
from migrate.preflight.evidence import Denied, Inspection
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "GUEST_BLOCKED", "OBJECTIONS", "judge", "judge_denied"]

GUEST_BLOCKED: Final = Check(
    check_id="guest-blocked",
    asked="Is there anything about the guest that lets nobody move it as it is?",
    why="What its hypervisor blocks, a running job or an argument that no description of a machine has a place for "
    "cannot be made again at the destination",
    remedy="Take it away from the guest first, or start the guest without it",
)
GUEST_SPEC: Final = Check(
    check_id="guest-spec",
    asked="Can the destination's driver read what the guest's machine is made of?",
    why="The empty machine there is made from it",
    remedy="Run the same version of vmferry on both hosts",
)
ACCELERATOR: Final = Check(
    check_id="accelerator",
    asked="Does the destination have and allow the guest's accelerator?",
    why="The device state of KVM's clocks and interrupt controllers fits no emulation, and the other way round",
    remedy="Add it to accels of [guests.KIND], and let the agent's user open it",
)
BINARY: Final = Check(
    check_id="hypervisor-binary",
    asked="Can the destination start its hypervisor?",
    why="The guest becomes a process of it",
    remedy="Install it, or set binary in [guests.KIND]",
)
DISK_FILE: Final = Check(
    check_id="disk-file",
    asked="Is each disk allowed, there and accessible at the destination?",
    why="The machine there opens the same path, as the agent's user",
    remedy="Mount the same storage there, allow its directory, and give the agent's user access",
)
DISK_CACHE: Final = Check(
    check_id="disk-cache",
    asked="Is each disk's cache mode safe for two hosts?",
    why="Pages that one host's cache holds are not what the other host reads",
    remedy='Only cache = "none" or "directsync" is safe when two hosts open one disk',
)
KERNEL_FILE: Final = Check(
    check_id="kernel-file",
    asked="Are the files that the guest was booted from allowed and there?",
    why="A reset after the move boots from them again",
    remedy="Put them below one of kernel_dirs of [guests.KIND] on both hosts",
)
NETWORK_BACKEND: Final = Check(
    check_id="network-backend",
    asked="Do the guest's network back ends exist at the destination, and are they allowed?",
    why="Without the bridge or tap behind it the guest's card is dead after the move",
    remedy="Make it there, with the same network behind it, and allow it in [guests.KIND]",
)
HUGEPAGES: Final = Check(
    check_id="hugepages",
    asked="Has the destination enough free huge pages of the guest's size?",
    why="RAM of huge pages comes from a reserved pool; the machine does not start without",
    remedy="Reserve more in /sys/kernel/mm/hugepages",
)
MEMORY_DIR: Final = Check(
    check_id="memory-dir",
    asked="Can the destination make the file that the guest's RAM lives in?",
    why="A guest of file-backed RAM has its RAM in that directory",
    remedy="Set memory_dir of [guests.KIND] to a tmpfs that the agent's user can write",
)
OBJECTIONS: Final = {
    check.check_id: check
    for check in (
        GUEST_SPEC,
        ACCELERATOR,
        BINARY,
        DISK_FILE,
        DISK_CACHE,
        KERNEL_FILE,
        NETWORK_BACKEND,
        HUGEPAGES,
        MEMORY_DIR,
    )
}
CHECKS: Final = (GUEST_BLOCKED, *hardware.CHECKS, *OBJECTIONS.values())


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge what blocks the guest, and pass on what the destination's driver has against it."""
    guest, host = inspection.guest, inspection.host
    yield from _blocked(guest, inspection.source_host)
    yield from hardware.judge(inspection)
    for objection in inspection.objections:
        check = OBJECTIONS.get(objection.check, GUEST_SPEC)
        yield check.refused(f"{host.name}: {objection.found}", objection.remedy or None)
    if guest.hypervisor != host.hypervisor:
        return
    objected = {objection.check for objection in inspection.objections}
    for check_id, check in OBJECTIONS.items():
        if check_id in objected:
            continue
        if not guest.is_described:
            yield check.unknown(
                f"{guest.name} has no description of its machine that {host.name} could judge",
                f"`{GUEST_BLOCKED.check_id}` says what stands against one",
            )
        else:
            yield check.ok(f"{host.name} has nothing against it")


def judge_denied(denied: Denied) -> Iterator[Finding]:
    """Judge what blocks the guest."""
    yield from _blocked(denied.guest, denied.source_host)


def _blocked(guest: GuestFacts, source_host: str) -> Iterator[Finding]:
    for blocker in guest.blockers:
        yield GUEST_BLOCKED.refused(f"{guest.name} cannot be moved as it is: {blocker}")
    if guest.blockers:
        return
    if guest.is_described:
        yield GUEST_BLOCKED.ok(f"nothing ties {guest.name} to {source_host}")
    else:
        yield GUEST_BLOCKED.refused(f"{guest.name} cannot be moved: no description of its machine was made")
