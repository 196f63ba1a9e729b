"""The CPU that the guest was started with, against what the destination's hypervisor can give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.preflight.evidence import Inspection, named
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "CPU_FEATURES", "CPU_MODEL", "judge"]

CPU_MODEL: Final = Check(
    check_id="cpu-model",
    asked="Can the destination's hypervisor give the guest's CPU model?",
    why="The machine there is started with the same model, and QEMU refuses one that it does not know",
    remedy="Start the guest with a CPU model that both hosts have",
)
CPU_FEATURES: Final = Check(
    check_id="cpu-features",
    asked="Has the destination every CPU feature that the guest was started with?",
    why="A guest's kernel and programs chose their instructions when they started: a missing one kills them",
    remedy="Start the guest with a smaller CPU model, or move it to another host",
)
CHECKS: Final = (CPU_MODEL, CPU_FEATURES)


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge the model and every feature of it."""
    guest, host = inspection.guest, inspection.host
    if guest.hypervisor != host.hypervisor:
        # The hypervisor is refused; what CPUs another one has is no answer.
        for check in CHECKS:
            yield check.unknown(f"{host.name} has no {guest.hypervisor} to ask", "")
        return
    wanted = set(guest.cpu.features)
    same_model = [cpu for cpu in host.cpus if cpu.model == guest.cpu.model]
    fitting = sorted(cpu.model for cpu in host.cpus if wanted <= set(cpu.features))
    advice = (
        f"Models there that have all of them: {named(fitting)}"
        if fitting
        else "No model there has all of them: start the guest with a smaller CPU model"
    )
    if not same_model:
        yield CPU_MODEL.refused(
            f"{guest.name} was started with CPU model {guest.cpu.model}, which {host.name} cannot give",
            advice,
        )
        return
    yield CPU_MODEL.ok(f"{host.name} gives the model {guest.cpu.model}")
    missing = sorted(wanted - set(same_model[0].features))
    if missing:
        yield CPU_FEATURES.refused(
            f"{host.name}'s {guest.cpu.model} lacks CPU features that {guest.name} uses: {', '.join(missing)}",
            advice,
        )
    else:
        yield CPU_FEATURES.ok(f"{host.name} gives {guest.cpu.model} with all {len(wanted)} features")
