"""Room for the guest at the destination, and for one more migration at both ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.facts import CapacityFacts, GuestFacts, MoveSlots, Survey
from migrate.preflight.evidence import Denied, Inspection
from migrate.preflight.report import Check, Finding

__all__ = [
    "BALLOON",
    "CHECKS",
    "CPU_OVERCOMMIT",
    "CPU_STALL_PERCENT",
    "DRAINING",
    "INCOMING_LIMIT",
    "LOAD",
    "MEMORY",
    "MEMORY_OVERCOMMIT",
    "MEMORY_PHYSICAL",
    "MEMORY_STALL_PERCENT",
    "OUTGOING_LIMIT",
    "OVERHEAD_BYTES",
    "PRESSURE",
    "SWAP",
    "SWAP_USED_SHARE",
    "VCPUS",
    "judge",
    "judge_denied",
]

MEMORY_PHYSICAL: Final = Check(
    check_id="memory-physical",
    asked="Has the destination as much memory as the guest, were it empty?",
    why="A guest that is larger than its host lives from swap, or its host ends it",
    remedy="Choose a larger host",
)
MEMORY_OVERCOMMIT: Final = Check(
    check_id="memory-overcommit",
    asked="May the RAM of all guests there and of this one be promised?",
    why="Guests use what they were promised sooner or later, all of them at once on a bad day",
    remedy="Move another guest away, choose another host, or raise memory_overcommit in [limits] there",
)
MEMORY: Final = Check(
    check_id="memory",
    asked="Has the destination enough free memory for the guest?",
    why="A host that runs out of memory ends processes, the guest's or others'",
    remedy="Free memory there, or choose another host",
)
SWAP: Final = Check(
    check_id="swap",
    asked="Does the guest fit there without anything being swapped out?",
    why="Swapped RAM is a thousand times slower: a guest of it seems to hang, and its other guests with it",
    remedy="Free memory there, or choose another host",
)
BALLOON: Final = Check(
    check_id="balloon",
    asked="Is there room for what the guest may have when its balloon is empty?",
    why="A balloon can be emptied at any time, so the whole maximum is needed there, whatever it leaves the guest now",
    remedy="Free memory there for the guest's whole maximum",
)
VCPUS: Final = Check(
    check_id="vcpus",
    asked="Has the destination as many CPUs as the guest has vCPUs?",
    why="It starts, but vCPUs that wait for a CPU while they hold a lock make the others spin: performance collapses",
    remedy="Choose a host with more CPUs, or give the guest fewer",
)
CPU_OVERCOMMIT: Final = Check(
    check_id="cpu-overcommit",
    asked="May the vCPUs of all guests there and of this one be promised?",
    why="Each vCPU more takes time from all the others",
    remedy="Move another guest away, choose another host, or raise cpu_overcommit in [limits] there",
)
LOAD: Final = Check(
    check_id="load",
    asked="Are CPUs free at the destination?",
    why="Receiving a guest takes CPU, and so does running it: where none is free both are slow",
    remedy="Choose another host, or move when this one is less busy",
)
PRESSURE: Final = Check(
    check_id="pressure",
    asked="Does the destination's kernel see no lack of memory or CPU?",
    why="A host that stalls already stalls more with one more guest",
    remedy="Choose another host, or find out what it stalls on (/proc/pressure)",
)
INCOMING_LIMIT: Final = Check(
    check_id="incoming-limit",
    asked="Does the destination take one more guest at the moment?",
    why="It takes so many at once and refuses the next",
    remedy="Wait for one to end, or raise incoming in [limits] there",
)
OUTGOING_LIMIT: Final = Check(
    check_id="outgoing-limit",
    asked="Does the source send one more guest at the moment?",
    why="It sends so many at once and refuses the next",
    remedy="Wait for one to end, or raise outgoing in [limits] of the source",
)
DRAINING: Final = Check(
    check_id="draining",
    asked="Do both agents begin new moves?",
    why="An agent that is being shut down finishes what runs and begins nothing",
    remedy="Start the agent again first, or choose another host",
)
CHECKS: Final = (
    MEMORY_PHYSICAL,
    MEMORY_OVERCOMMIT,
    MEMORY,
    SWAP,
    BALLOON,
    VCPUS,
    CPU_OVERCOMMIT,
    LOAD,
    PRESSURE,
    INCOMING_LIMIT,
    OUTGOING_LIMIT,
    DRAINING,
)

# What the destination needs beside the guest's RAM: the hypervisor's own process, page tables, buffers.
OVERHEAD_BYTES: Final = 64 << 20
# Kernels put idle pages out at any time; a host that has put out more than half of its swap lacks memory.
SWAP_USED_SHARE: Final = 0.5
# Shares of the last minute in which something waited. Memory: hosts in order show 0; systemd-oomd kills at 60.
MEMORY_STALL_PERCENT: Final = 10.0
# CPU: a host with all CPUs at work shows some; from half of the time on, vCPUs wait as often as they run.
CPU_STALL_PERCENT: Final = 50.0


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge memory, CPUs and the limits of both agents."""
    there = inspection.there.capacity
    yield from _memory(inspection, there)
    yield _balloon(inspection)
    yield from _cpus(inspection, there)
    yield _load(inspection, there)
    yield _pressure(inspection, there)
    yield _incoming(inspection, there.moves if there else None)
    yield _outgoing(inspection.source_host, inspection.here)
    yield from _draining(inspection.source_host, inspection.here.capacity, is_destination=False)
    yield from _draining(inspection.host.name, there, is_destination=True)


def judge_denied(denied: Denied) -> Iterator[Finding]:
    """Judge what the source alone knows."""
    yield _outgoing(denied.source_host, denied.here)
    yield from _draining(denied.source_host, denied.here.capacity, is_destination=False)


# ---------------------------------------------------------------------- memory


def _memory(inspection: Inspection, there: CapacityFacts | None) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    yield _physical(guest, host.name, there)
    yield _promised_memory(guest, host.name, there)
    needed = _needed_bytes(inspection)
    if needed <= host.free_memory_bytes:
        yield MEMORY.ok(
            f"{host.name} has {_mib(host.free_memory_bytes)} free, {_mib(max(needed, 0))} are needed"
        )
    else:
        yield MEMORY.refused(
            f"{host.name} has {_mib(host.free_memory_bytes)} free, and {guest.name} needs {_mib(needed)}"
        )
    yield _swap(inspection, there, needed)


def _needed_bytes(inspection: Inspection) -> int:
    return inspection.guest.ram_bytes + OVERHEAD_BYTES - inspection.reserved_bytes


def _physical(guest: GuestFacts, host: str, there: CapacityFacts | None) -> Finding:
    if there is None or there.physical_bytes is None:
        return MEMORY_PHYSICAL.unknown(f"{host} does not say how much memory it has")
    needed = guest.ram_bytes + OVERHEAD_BYTES
    found = f"{host} has {_mib(there.physical_bytes)} of memory, and {guest.name} needs {_mib(needed)}"
    return MEMORY_PHYSICAL.ok(found) if needed <= there.physical_bytes else MEMORY_PHYSICAL.refused(found)


def _promised_memory(guest: GuestFacts, host: str, there: CapacityFacts | None) -> Finding:
    if there is None or there.physical_bytes is None:
        return MEMORY_OVERCOMMIT.unknown(f"{host} does not say what it has and has promised")
    promised, ratio = there.promised_bytes + guest.ram_bytes, there.memory_overcommit
    found = (
        f"the other guests on {host} may have {_mib(there.promised_bytes)}, with {guest.name} it would be "
        f"{_mib(promised)}: {host} has {_mib(there.physical_bytes)} and promises {ratio:g} times that"
    )
    fits = promised <= ratio * there.physical_bytes
    return MEMORY_OVERCOMMIT.ok(found) if fits else MEMORY_OVERCOMMIT.refused(found)


def _swap(inspection: Inspection, there: CapacityFacts | None, needed: int) -> Finding:
    host, free_bytes = inspection.host.name, inspection.host.free_memory_bytes
    if there is None or there.swap_bytes is None or there.swap_free_bytes is None:
        return SWAP.unknown(f"{host} does not say whether it swaps")
    swap_bytes, used_bytes = there.swap_bytes, there.swap_bytes - there.swap_free_bytes
    if free_bytes < needed <= free_bytes + there.swap_free_bytes:
        return SWAP.warning(
            f"{inspection.guest.name} would fit on {host} only if {_mib(needed - free_bytes)} were swapped out"
        )
    if swap_bytes <= 0:
        return SWAP.ok(f"{host} has no swap")
    found = f"{host} has swapped out {_mib(used_bytes)} of {_mib(swap_bytes)}"
    return SWAP.warning(found) if used_bytes > SWAP_USED_SHARE * swap_bytes else SWAP.ok(found)


def _balloon(inspection: Inspection) -> Finding:
    guest, host = inspection.guest, inspection.host
    demand = guest.demand
    if demand is None:
        return BALLOON.unknown(f"{inspection.source_host} does not say whether {guest.name} has a balloon")
    if not demand.has_balloon:
        return BALLOON.ok(f"{guest.name} has no balloon")
    if demand.balloon_bytes is None:
        return BALLOON.unknown(f"{guest.name} has a balloon, and nobody said how large it is")
    found = (
        f"the balloon of {guest.name} leaves it {_mib(demand.balloon_bytes)} of {_mib(guest.ram_bytes)} now, and "
        f"{host.name} has {_mib(host.free_memory_bytes)} free"
    )
    if _needed_bytes(inspection) <= host.free_memory_bytes:
        return BALLOON.ok(found)
    return BALLOON.warning(found)


# ------------------------------------------------------------------------ CPUs


def _cpus(inspection: Inspection, there: CapacityFacts | None) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host.name
    if guest.demand is None or there is None or there.online_cpus is None:
        for check in (VCPUS, CPU_OVERCOMMIT):
            yield check.unknown(f"nobody said how many vCPUs {guest.name} has and how many CPUs {host}")
        return
    vcpus, cpus = guest.demand.vcpus, there.online_cpus
    found = f"{guest.name} has {vcpus} vCPUs and {host} {cpus} CPUs"
    # KVM runs it all the same, and a guest in distress may have nowhere else to go: the operator decides.
    yield VCPUS.ok(found) if vcpus <= cpus else VCPUS.warning(found)
    promised = there.promised_vcpus + vcpus
    found = (
        f"the other guests on {host} have {there.promised_vcpus} vCPUs, with {guest.name} it would be {promised}: "
        f"{host} has {cpus} CPUs and promises {there.cpu_overcommit:g} times that"
    )
    fits = promised <= there.cpu_overcommit * cpus
    yield CPU_OVERCOMMIT.ok(found) if fits else CPU_OVERCOMMIT.refused(found)


def _load(inspection: Inspection, there: CapacityFacts | None) -> Finding:
    host = inspection.host.name
    if there is None or there.load_5min is None or there.online_cpus is None:
        return LOAD.unknown(f"{host} does not say how busy it is")
    found = f"{host} has {there.online_cpus} CPUs and a load of {there.load_5min:.1f} over 5 minutes"
    return LOAD.warning(found) if there.load_5min > there.online_cpus else LOAD.ok(found)


def _pressure(inspection: Inspection, there: CapacityFacts | None) -> Finding:
    host = inspection.host.name
    if there is None or there.memory_pressure is None or there.cpu_pressure is None:
        return PRESSURE.unknown(f"{host} has no /proc/pressure", "Boot its kernel with psi=1")
    found = (
        f"on {host} something waited for memory {there.memory_pressure:.1f} % of the last minute, "
        f"for a CPU {there.cpu_pressure:.1f} %"
    )
    stalls = there.memory_pressure > MEMORY_STALL_PERCENT or there.cpu_pressure > CPU_STALL_PERCENT
    return PRESSURE.warning(found) if stalls else PRESSURE.ok(found)


# ------------------------------------------------------------------ migrations


def _incoming(inspection: Inspection, moves: MoveSlots | None) -> Finding:
    host = inspection.host.name
    if moves is None:
        return INCOMING_LIMIT.unknown(f"{host} does not say how many guests are coming to it")
    found = (
        f"{moves.incoming} guests are coming to {host} already, the limit is {moves.incoming_limit} "
        "([limits] incoming)"
    )
    is_full = moves.incoming >= moves.incoming_limit and not moves.is_coming
    return INCOMING_LIMIT.refused(found) if is_full else INCOMING_LIMIT.ok(found)


def _outgoing(source_host: str, here: Survey) -> Finding:
    if here.capacity is None:
        return OUTGOING_LIMIT.unknown(f"{source_host} does not say how many guests are leaving it")
    moves = here.capacity.moves
    found = (
        f"{moves.outgoing} guests are leaving {source_host} already, the limit is {moves.outgoing_limit} "
        "([limits] outgoing)"
    )
    is_full = moves.outgoing >= moves.outgoing_limit and not moves.is_leaving
    return OUTGOING_LIMIT.refused(found) if is_full else OUTGOING_LIMIT.ok(found)


def _draining(host: str, capacity: CapacityFacts | None, *, is_destination: bool) -> Iterator[Finding]:
    if capacity is None:
        yield DRAINING.unknown(f"{host} does not say whether it is being shut down")
        return
    moves = capacity.moves
    is_let_in = moves.is_coming if is_destination else moves.is_leaving
    takes = "takes no more guests" if is_destination else "starts no more moves"
    if not moves.is_draining:
        yield DRAINING.ok(f"the agent on {host} is not being shut down")
    elif is_let_in:
        yield DRAINING.ok(f"the agent on {host} is being shut down, and finishes this move first")
    else:
        yield DRAINING.refused(f"the agent on {host} is being shut down and {takes}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"
