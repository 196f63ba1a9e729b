from __future__ import annotations

from dataclasses import replace

import pytest

from agents.demo.proof import Evidence, judge
from tests.agents.demo.evidence import GOOD, REPORT, STANDSTILL, look


def test_good_evidence_proves_all_claims() -> None:
    proof = judge(GOOD)
    assert proof.holds
    assert proof.failed == ()
    assert [claim.name for claim in proof.claims] == ["ram_equal", "guest_went_on", "equals_unmoved_run"]


@pytest.mark.parametrize(
    ("spoiled", "failed", "word"),
    [
        (replace(GOOD, report=replace(REPORT, source_digest=b"\x02" * 16)), "ram_equal", "0202020202020202"),
        (replace(GOOD, report=replace(REPORT, source_digest=None)), "ram_equal", "lacks a digest"),
        (replace(GOOD, report=replace(REPORT, destination_digest=None)), "ram_equal", "lacks a digest"),
        (replace(GOOD, arrived=look(99)), "guest_went_on", "ticks do not go on"),
        (replace(GOOD, later=look(150)), "guest_went_on", "instructions do not go on"),
        (replace(GOOD, later=look(180, errors=1)), "guest_went_on", "found 1 errors"),
        (
            replace(GOOD, later=look(180, is_running=False, state="faulted", problem="bad opcode")),
            "guest_went_on",
            "bad opcode",
        ),
        (
            replace(GOOD, later=look(180, is_running=False, state="paused")),
            "guest_went_on",
            "on host-b it is paused",
        ),
        (replace(GOOD, source_has_ended=False), "guest_went_on", "still there"),
        (replace(GOOD, moved=replace(STANDSTILL, ram=b"x")), "equals_unmoved_run", "differ in RAM"),
        (
            replace(GOOD, moved=replace(STANDSTILL, device_state=b"x", disk=b"x")),
            "equals_unmoved_run",
            "differ in registers and devices, disk",
        ),
        (
            replace(GOOD, unmoved=replace(STANDSTILL, instructions=1)),
            "equals_unmoved_run",
            "instruction count",
        ),
    ],
)
def test_each_piece_of_bad_evidence_fails_its_claim_alone(spoiled: Evidence, failed: str, word: str) -> None:
    proof = judge(spoiled)
    assert not proof.holds
    assert proof.failed == (failed,)
    assert word in " ".join(claim.sentence for claim in proof.claims if not claim.holds)


def test_a_guest_that_had_no_time_since_the_last_look_has_still_gone_on() -> None:
    assert judge(replace(GOOD, arrived=look(100))).holds


def test_a_guest_that_is_never_the_same_twice_is_proved_by_the_other_two_claims() -> None:
    proof = judge(replace(GOOD, moved=None, unmoved=None, unmoved_s=None))
    assert proof.holds
    assert proof.equals_unmoved_run is None
    assert [claim.name for claim in proof.claims] == ["ram_equal", "guest_went_on"]
