"""Room: each check at its edge, and every fact that may be missing or nonsense."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from migrate.facts import CapacityFacts, GuestDemand, Survey
from migrate.preflight import Inspection, Severity, Unanswered, capacity, examine, examine_alone
from migrate.preflight.capacity import (
    CPU_STALL_PERCENT,
    MEMORY_STALL_PERCENT,
    OVERHEAD_BYTES,
    SWAP_USED_SHARE,
)
from tests.migrate.test_preflight import GOOD, HERE, HOST
from tests.migrate.world import CAPACITY, FACTS

GIB = 1 << 30


def worst(check: str, inspection: Inspection) -> Severity:
    found = {f.severity for f in capacity.judge(inspection) if f.check == check}
    order = (Severity.REFUSED, Severity.WARNING, Severity.UNKNOWN, Severity.OK)
    return next(severity for severity in order if severity in found)


def there(**changed: object) -> Inspection:
    facts = replace(CAPACITY, **changed)  # type: ignore[arg-type]
    return replace(GOOD, there=replace(GOOD.there, capacity=facts))


def here(**moves: object) -> Inspection:
    slots = replace(CAPACITY.moves, **moves)  # type: ignore[arg-type]
    return replace(GOOD, here=replace(HERE, capacity=replace(CAPACITY, moves=slots)))


def moving_there(**moves: object) -> Inspection:
    return there(moves=replace(CAPACITY.moves, **moves))  # type: ignore[arg-type]


def test_a_guest_as_large_as_its_host_fits_and_one_that_is_larger_does_not() -> None:
    needed = FACTS.ram_bytes + OVERHEAD_BYTES
    for physical_bytes, severity in ((needed, Severity.OK), (needed - 1, Severity.REFUSED)):
        inspection = there(physical_bytes=physical_bytes, promised_bytes=0)
        assert worst("memory-physical", inspection) is severity
        # Another limit than the host's size does not hide it.
        assert worst("memory-overcommit", inspection) is Severity.OK


@pytest.mark.parametrize(("ratio", "promises"), [(1.0, 4 * GIB), (0.5, 2 * GIB), (1.5, 6 * GIB)])
def test_ram_is_promised_up_to_the_ratio_and_no_byte_more(ratio: float, promises: int) -> None:
    room = promises - FACTS.ram_bytes
    exact = there(memory_overcommit=ratio, promised_bytes=room)
    assert worst("memory-overcommit", exact) is Severity.OK
    over = there(memory_overcommit=ratio, promised_bytes=room + 1)
    assert worst("memory-overcommit", over) is Severity.REFUSED
    # It is the promise that is refused: there is free memory, and the host is large enough.
    assert {f.check for f in capacity.judge(over) if f.severity is Severity.REFUSED} == {"memory-overcommit"}


def test_what_would_fit_by_swapping_only_is_refused_and_the_swap_says_why() -> None:
    free_bytes = FACTS.ram_bytes + OVERHEAD_BYTES - 4096
    inspection = replace(
        there(swap_bytes=GIB, swap_free_bytes=GIB), host=replace(HOST, free_memory_bytes=free_bytes)
    )
    assert worst("memory", inspection) is Severity.REFUSED
    assert worst("swap", inspection) is Severity.WARNING
    # Not even the swap would help: that is the memory's business alone.
    without = replace(inspection, there=there(swap_bytes=GIB, swap_free_bytes=GIB - GIB).there)
    assert worst("memory", without) is Severity.REFUSED
    assert worst("swap", there(swap_bytes=0, swap_free_bytes=0)) is Severity.OK


def test_swap_that_is_more_than_half_used_deserves_a_look() -> None:
    used = int(GIB * SWAP_USED_SHARE)
    assert worst("swap", there(swap_bytes=GIB, swap_free_bytes=GIB - used)) is Severity.OK
    assert worst("swap", there(swap_bytes=GIB, swap_free_bytes=GIB - used - 1)) is Severity.WARNING


def test_more_vcpus_than_cpus_work_and_deserve_a_look() -> None:
    for vcpus, severity in ((4, Severity.OK), (5, Severity.WARNING)):
        guest = replace(FACTS, demand=GuestDemand(vcpus=vcpus))
        assert worst("vcpus", replace(GOOD, guest=guest)) is severity


def test_vcpus_are_promised_up_to_the_ratio_and_not_one_more() -> None:
    # 4 CPUs twice, of which this guest has 2.
    assert worst("cpu-overcommit", there(cpu_overcommit=2.0, promised_vcpus=6)) is Severity.OK
    assert worst("cpu-overcommit", there(cpu_overcommit=2.0, promised_vcpus=7)) is Severity.REFUSED


def test_a_load_above_the_number_of_cpus_deserves_a_look() -> None:
    assert worst("load", there(load_5min=4.0)) is Severity.OK
    assert worst("load", there(load_5min=4.01)) is Severity.WARNING


@pytest.mark.parametrize(
    ("which", "edge"), [("memory_pressure", MEMORY_STALL_PERCENT), ("cpu_pressure", CPU_STALL_PERCENT)]
)
def test_a_host_that_stalls_deserves_a_look(which: str, edge: float) -> None:
    assert worst("pressure", there(**{which: edge})) is Severity.OK
    assert worst("pressure", there(**{which: edge + 0.01})) is Severity.WARNING


def test_a_balloon_needs_room_for_the_maximum() -> None:
    guest = replace(FACTS, demand=GuestDemand(vcpus=1, has_balloon=True, balloon_bytes=1 << 20))
    assert worst("balloon", replace(GOOD, guest=guest)) is Severity.OK
    tight = replace(GOOD, guest=guest, host=replace(HOST, free_memory_bytes=FACTS.ram_bytes))
    assert worst("balloon", tight) is Severity.WARNING
    assert worst("memory", tight) is Severity.REFUSED
    silent = replace(FACTS, demand=GuestDemand(vcpus=1, has_balloon=True))
    assert worst("balloon", replace(GOOD, guest=silent)) is Severity.UNKNOWN


def test_a_destination_that_is_full_refuses_one_more() -> None:
    assert worst("incoming-limit", moving_there(incoming=3)) is Severity.OK
    assert worst("incoming-limit", moving_there(incoming=4)) is Severity.REFUSED
    # Whoever was let in is counted already: the check before the switchover must not refuse it.
    assert worst("incoming-limit", moving_there(incoming=4, is_coming=True)) is Severity.OK
    # It is the other end's limit that counts at the other end.
    assert worst("outgoing-limit", moving_there(outgoing=9)) is Severity.OK


def test_a_source_that_sends_enough_refuses_one_more() -> None:
    assert worst("outgoing-limit", here(outgoing=3)) is Severity.OK
    assert worst("outgoing-limit", here(outgoing=4)) is Severity.REFUSED
    assert worst("outgoing-limit", here(outgoing=4, is_leaving=True)) is Severity.OK
    assert worst("incoming-limit", here(incoming=9)) is Severity.OK


def test_an_agent_that_is_shut_down_begins_nothing_and_finishes_what_it_began() -> None:
    assert worst("draining", moving_there(is_draining=True)) is Severity.REFUSED
    assert worst("draining", moving_there(is_draining=True, is_coming=True)) is Severity.OK
    assert worst("draining", here(is_draining=True)) is Severity.REFUSED
    assert worst("draining", here(is_draining=True, is_leaving=True)) is Severity.OK
    # A guest that leaves the destination is not one that comes to it.
    assert worst("draining", moving_there(is_draining=True, is_leaving=True)) is Severity.REFUSED


def test_a_guest_that_somebody_is_in_doubt_about_begins_no_other_move() -> None:
    assert worst("in-doubt", here(in_doubt_job="f" * 32)) is Severity.REFUSED
    # It may be the very move that this one goes on with: the destination decides when it is asked to prepare.
    assert worst("in-doubt", moving_there(in_doubt_job="f" * 32)) is Severity.WARNING
    found = next(f.found for f in capacity.judge(moving_there(in_doubt_job="f" * 9999)) if "job f" in f.found)
    assert len(found) < 200


def test_what_was_not_looked_at_is_unknown_and_stops_nothing() -> None:
    blind = replace(
        GOOD, guest=replace(FACTS, demand=None), here=Survey(at_s=HERE.at_s), there=Survey(at_s=HERE.at_s)
    )
    report = examine(blind)
    assert report.is_passed
    checks = {check.check_id for check in capacity.CHECKS}
    unknown = {f.check for f in report.of(Severity.UNKNOWN)} & checks
    assert unknown == checks - {"memory"}


OPTIONAL = ("physical_bytes", "swap_bytes", "swap_free_bytes", "online_cpus", "load_5min")
PRESSURES = ("memory_pressure", "cpu_pressure")
PROMISES = ("promised_bytes", "promised_vcpus")


@pytest.mark.parametrize("name", OPTIONAL + PRESSURES + PROMISES)
def test_a_fact_that_the_kernel_does_not_give_is_unknown(name: str) -> None:
    report = examine(there(**{name: None}))
    assert report.is_passed
    assert report.of(Severity.UNKNOWN)
    assert not report.of(Severity.WARNING)


@pytest.mark.parametrize("nonsense", [-(1 << 63), -1, 0, (1 << 64) - 1])
def test_nonsense_of_a_peer_breaks_no_check(nonsense: int) -> None:
    checks = {f.check for f in examine(GOOD).findings}
    for one in fields(CapacityFacts):
        if one.name != "moves":
            # A peer's float is finite, an int has 64 bits; where a float is meant, it may be as large as floats are.
            is_whole = one.name.endswith(("_bytes", "_cpus", "_vcpus"))
            for value in (nonsense,) if is_whole else (float(nonsense), 1e308, -1e308):
                assert {f.check for f in examine(there(**{one.name: value})).findings} == checks
    for name in ("incoming", "incoming_limit", "outgoing", "outgoing_limit"):
        assert {f.check for f in examine(moving_there(**{name: nonsense})).findings} == checks
    guest = replace(FACTS, demand=GuestDemand(vcpus=nonsense, has_balloon=True, balloon_bytes=nonsense))
    assert {f.check for f in examine(replace(GOOD, guest=guest)).findings} == checks


def test_where_the_destination_says_nothing_the_source_still_knows_its_own_limits() -> None:
    full = here(outgoing=4, is_draining=True).here
    report = examine_alone(
        Unanswered(
            guest=FACTS,
            source_host="host-a",
            host="host-b",
            here=full,
            reason="no [[allow]]",
            is_denied=True,
        )
    )
    assert {f.check for f in report.of(Severity.REFUSED)} == {"outgoing-limit", "draining", "allowed"}


def test_each_sentence_names_who_has_what() -> None:
    report = examine(
        replace(
            there(physical_bytes=GIB, promised_bytes=GIB, moves=replace(CAPACITY.moves, incoming=4)),
            here=here(outgoing=4).here,
        )
    )
    sentences = {f.check: f.found for f in report.of(Severity.REFUSED)}
    assert "the other guests on host-b may have 1024 MiB" in sentences["memory-overcommit"]
    assert "the limit is 4 ([limits] incoming)" in sentences["incoming-limit"]
    assert "host-a" in sentences["outgoing-limit"]
    assert all(f.remedy for f in report.of(Severity.REFUSED))
