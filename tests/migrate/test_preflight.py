from __future__ import annotations

from dataclasses import replace

from migrate.facts import CpuFacts, HostFacts, HostHardware, Objection, PathFacts, Survey
from migrate.preflight import AREAS, RECORDS, Inspection, LockAnswer, Probe, Reading, Severity, examine
from migrate.preflight.capacity import OVERHEAD_BYTES
from migrate.preflight.machine import MAX_DRIFT_S, WARN_DRIFT_S
from tests.migrate.world import CAPACITY, CPU, DISK, FACTS, IMAGE, security

NOW_S = 1.8e9
HOST = HostFacts(
    name="host-b",
    hypervisor="fake",
    cpus=(CPU,),
    machines=("fake-0", "fake-1"),
    free_memory_bytes=1 << 30,
    guest_ids=(),
    hardware=HostHardware(version="1.0", device_types=("fake-disk",), memory_nodes=(0,)),
)
HERE = Survey(at_s=NOW_S, capacity=CAPACITY, security=security(NOW_S))
# What both ends read of the disk: the source's nonce, and the destination's behind it.
READ = Reading(
    disk=DISK.name, content=b"nonce", error=None, image=IMAGE, echo=b"echo", lock=LockAnswer.REFUSED
)
GOOD = Inspection(
    guest=FACTS,
    source_host="host-a",
    host=HOST,
    here=HERE,
    there=replace(HERE, at_s=NOW_S + 0.01),
    answer_s=0.02,
    nonces={DISK.name: b"nonce"},
    readings=(READ,),
    ownership_error=None,
    path=PathFacts(
        data_port=7701,
        rtt_s=0.0001,
        ping_s=0.0005,
        mtu_bytes=1500,
        mss_bytes=1448,
        goodput_bytes_per_s=1e9,
        measured_s=1.0,
        measured_bytes=10**9,
        connections=2,
    ),
    probes=(Probe(disk=DISK.name, path="/shared/p", image=DISK.path, offsets=(0, 4096), is_locked=True),),
    before=(replace(READ, echo=b""),),
    after=(READ,),
)


def refused(inspection: Inspection) -> set[str]:
    return {f.check for f in examine(inspection).findings if f.severity is Severity.REFUSED}


def test_a_good_pair_passes_with_a_finding_for_every_check() -> None:
    report = examine(GOOD)
    assert report.is_passed
    assert {f.check for f in report.findings} == {check.check_id for area in AREAS for check in area.CHECKS}
    assert {f.severity for f in report.findings} == {Severity.OK}


def test_each_problem_is_refused_alone() -> None:
    changes = {
        "names": replace(GOOD, source_host=HOST.name),
        "hypervisor": replace(GOOD, host=replace(HOST, hypervisor="other")),
        "machine": replace(GOOD, host=replace(HOST, machines=("fake-0",))),
        "guest-blocked": replace(GOOD, guest=replace(FACTS, blockers=("VFIO",))),
        "network-backend": replace(
            GOOD, objections=(Objection(check="network-backend", found="no bridge", remedy="Make it"),)
        ),
        # Of a driver that is newer than this one.
        "guest-spec": replace(GOOD, objections=(Objection(check="unheard-of", found="no", remedy=""),)),
        "clock": replace(GOOD, there=replace(HERE, at_s=NOW_S - 11)),
        "cpu-model": replace(GOOD, host=replace(HOST, cpus=(CpuFacts(model="Nehalem", features=()),))),
        "cpu-features": replace(
            GOOD, host=replace(HOST, cpus=(CpuFacts(model="Haswell", features=("sse2",)),))
        ),
        "storage": replace(GOOD, readings=(replace(READ, content=b"other"),)),
        "ownership": replace(GOOD, ownership_error="read-only file system"),
        "memory": replace(GOOD, host=replace(HOST, free_memory_bytes=1 << 20)),
        "identity": replace(GOOD, host=replace(HOST, guest_ids=(FACTS.guest_id,))),
    }
    for check, inspection in changes.items():
        assert refused(inspection) == {check}


def test_records_that_are_beside_no_disk_are_proved_to_be_in_one_place() -> None:
    planted = replace(GOOD, nonces=GOOD.nonces | {RECORDS: b"nonce"})
    found = Reading(disk=RECORDS, content=b"nonce", error=None)
    assert refused(planted) == {"ownership"}
    assert refused(replace(planted, readings=(*GOOD.readings, replace(found, content=b"other")))) == {
        "ownership"
    }
    assert refused(replace(planted, readings=(*GOOD.readings, found))) == set()


def test_three_problems_give_three_findings_and_three_sentences() -> None:
    report = examine(
        replace(
            GOOD,
            host=replace(HOST, free_memory_bytes=0, guest_ids=(FACTS.guest_id,)),
            readings=(replace(READ, content=b"other"),),
        )
    )
    assert len(report.problems) == 3


def test_exactly_enough_memory_is_enough_and_a_byte_less_is_not() -> None:
    needed = FACTS.ram_bytes + OVERHEAD_BYTES
    assert refused(replace(GOOD, host=replace(HOST, free_memory_bytes=needed))) == set()
    assert refused(replace(GOOD, host=replace(HOST, free_memory_bytes=needed - 1))) == {"memory"}


def test_memory_that_is_already_there_is_not_asked_for_twice() -> None:
    tight = replace(HOST, free_memory_bytes=OVERHEAD_BYTES)
    assert refused(replace(GOOD, host=tight)) == {"memory"}
    assert refused(replace(GOOD, host=tight, reserved_bytes=FACTS.ram_bytes)) == set()


def test_what_was_not_proved_is_not_believed() -> None:
    unseen = {"storage", "disk-content", "disk-access"}
    for readings, nonces, found in (
        ((), GOOD.nonces, unseen),
        (GOOD.readings, {}, {"storage"}),
        ((replace(READ, content=None, error="no such file"),), GOOD.nonces, {"storage"}),
        ((replace(READ, disk="other"),), GOOD.nonces, unseen),
        ((replace(READ, image=None),), GOOD.nonces, unseen),
    ):
        assert refused(replace(GOOD, readings=readings, nonces=nonces)) == found


def test_a_host_that_names_no_machine_and_no_cpu_is_not_told_to_upgrade() -> None:
    findings = {f.check: f for f in examine(replace(GOOD, host=replace(HOST, machines=(), cpus=()))).findings}
    for check in ("machine", "cpu-model"):
        assert findings[check].severity is Severity.REFUSED
        assert "says of its hypervisor" in findings[check].remedy


def test_models_that_would_fit_are_named() -> None:
    host = replace(HOST, cpus=(CpuFacts(model="Skylake", features=("avx", "avx2", "sse2")),))
    (problem,) = examine(replace(GOOD, host=host)).problems
    assert "Skylake" in problem


def clock(ahead_s: float, answer_s: float) -> Severity:
    inspection = replace(GOOD, there=replace(HERE, at_s=NOW_S + ahead_s), answer_s=answer_s)
    return next(f.severity for f in examine(inspection).findings if f.check == "clock")


def test_clocks_may_differ_by_what_the_answer_took() -> None:
    assert clock(3.0, 3.0) is Severity.OK
    assert clock(3.0, 1.0) is Severity.WARNING
    assert clock(-WARN_DRIFT_S - 0.1, 60.0) is Severity.WARNING
    assert clock(MAX_DRIFT_S + 2.1, 2.0) is Severity.REFUSED
    assert clock(-MAX_DRIFT_S - 0.1, 60.0) is Severity.REFUSED
