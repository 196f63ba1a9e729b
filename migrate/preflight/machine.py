"""The machine that the guest is: its hypervisor, its versioned type, and the clocks of the two hosts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.preflight.evidence import MAX_NAMED, Inspection
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "CLOCK", "HYPERVISOR", "MACHINE", "MAX_DRIFT_S", "judge"]

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
CLOCK: Final = Check(
    check_id="clock",
    asked="Do the clocks of the two hosts agree?",
    why="A guest's real-time clock follows its host's: it would see time jump, and its leases and logs with it",
    remedy="Run chrony or another time service on both hosts",
)
CHECKS: Final = (HYPERVISOR, MACHINE, CLOCK)

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
    if guest.machine in host.machines:
        yield MACHINE.ok(f"{host.name} knows the machine {guest.machine}")
        return
    known = ", ".join(host.machines[-MAX_NAMED:]) or "none"
    yield MACHINE.refused(
        f"{guest.name} is a machine of type {guest.machine}, which {host.name} does not know: it knows {known}",
        f"Upgrade the hypervisor of {host.name}, or start the guest with one of those types",
    )


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
