"""The demo's proof: what was seen, and what follows from it.

Law: pure; evidence in, verdict out. A claim that could not be examined does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from agents.demo.guests import Look
from agents.units import approx_duration
from migrate.stats import Report

__all__ = ["Claim", "Evidence", "Proof", "Standstill", "judge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """A guest that stands still after `instructions`: all of it, byte for byte. `ram` is a fingerprint of its RAM."""

    instructions: int
    ram: bytes
    device_state: bytes
    disk: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was seen.

    `at_source` is the last look at the guest before it left, `arrived` the first look after, and `later` one
    some time after that. `source_has_ended`: the process that it was at the source is no more. `unmoved` is
    the same guest from boot to the same count, in a process that it never left; it and `moved` are None for a kind of
    guest that is not deterministic.
    """

    report: Report
    at_source: Look
    arrived: Look
    later: Look
    source_has_ended: bool
    moved: Standstill | None = None
    unmoved: Standstill | None = None
    unmoved_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One part of the proof. `sentence` says what was compared and found."""

    name: str
    holds: bool
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The claims. The proof holds if all do. `equals_unmoved_run` is None where no other run could be the same."""

    ram_equal: Claim
    guest_went_on: Claim
    equals_unmoved_run: Claim | None

    @property
    def claims(self) -> tuple[Claim, ...]:
        """All claims that were made."""
        made = (self.ram_equal, self.guest_went_on, self.equals_unmoved_run)
        return tuple(claim for claim in made if claim is not None)

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the claims that do not hold."""
        return tuple(claim.name for claim in self.claims if not claim.holds)


def judge(evidence: Evidence) -> Proof:
    """Say what the evidence proves."""
    return Proof(
        ram_equal=_ram_equal(evidence.report),
        guest_went_on=_guest_went_on(evidence),
        equals_unmoved_run=_equals_unmoved_run(evidence),
    )


def _ram_equal(report: Report) -> Claim:
    source, destination = report.source_digest, report.destination_digest
    if source is None or destination is None:
        return Claim(
            name="ram_equal",
            holds=False,
            sentence="the RAM of both ends was not compared: the report lacks a digest",
        )
    if source != destination:
        sentence = (
            f"the digest of all RAM, read again at {report.source} after the stop, is {source.hex()[:16]}; "
            f"that of {report.destination} at the stop is {destination.hex()[:16]}"
        )
    else:
        sentence = (
            f"all RAM, read again at {report.source} after the stop, has the digest that "
            f"{report.destination} had at the stop: {source.hex()[:16]}"
        )
    return Claim(name="ram_equal", holds=source == destination, sentence=sentence)


def _guest_went_on(evidence: Evidence) -> Claim:
    report, before, arrived, later = evidence.report, evidence.at_source, evidence.arrived, evidence.later
    problems: list[str] = []
    if not before.ticks <= arrived.ticks < later.ticks:
        problems.append("its ticks do not go on")
    if not before.work <= arrived.work < later.work:
        problems.append(f"its {later.work_unit} do not go on")
    if later.errors:
        problems.append(f"its own check of its memory found {later.errors} errors")
    if later.problem or not later.is_running:
        problems.append(f"on {report.destination} it is {later.state} {later.problem}".rstrip())
    if not evidence.source_has_ended:
        problems.append(f"its process on {report.source} is still there")
    counted = (
        f"it counted to {before.ticks} at the last look on {report.source}, to {later.ticks} on "
        f"{report.destination}"
    )
    if problems:
        return Claim(name="guest_went_on", holds=False, sentence=f"{counted}; but {', '.join(problems)}")
    return Claim(
        name="guest_went_on",
        holds=True,
        sentence=f"{counted}, and its own checks of its memory found no error; on {report.source} it has ended",
    )


def _equals_unmoved_run(evidence: Evidence) -> Claim | None:
    moved, unmoved = evidence.moved, evidence.unmoved
    if moved is None or unmoved is None:
        return None
    differing = [
        name
        for name, one, other in (
            ("instruction count", moved.instructions, unmoved.instructions),
            ("RAM", moved.ram, unmoved.ram),
            ("registers and devices", moved.device_state, unmoved.device_state),
            ("disk", moved.disk, unmoved.disk),
        )
        if one != other
    ]
    run = f"the same guest was run again from boot for {moved.instructions} instructions and not moved"
    if differing:
        sentence = f"{run}: the two differ in {', '.join(differing)}"
    else:
        took = approx_duration(evidence.unmoved_s or 0.0)
        sentence = f"{run} ({took}): its RAM, registers, devices and disk are the same, to the byte"
    return Claim(name="equals_unmoved_run", holds=not differing, sentence=sentence)
