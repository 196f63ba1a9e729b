"""Protection: each check at its edge, and every fact that may be missing or nonsense."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migrate.facts import (
    ApparmorFacts,
    Confinement,
    Permission,
    SecurityFacts,
    SelinuxFacts,
    Survey,
)
from migrate.preflight import Finding, Inspection, Severity, Unanswered, examine, examine_alone, security
from migrate.preflight.security import MIN_LEFT_S, MIN_LEFT_UNDER_WAY_S, WARN_LEFT_S
from tests.migrate.test_preflight import GOOD, HERE, NOW_S
from tests.migrate.world import FACTS, YEAR_S
from tests.migrate.world import security as secure

SVIRT = "system_u:system_r:svirt_t:s0:c12,c345"
ENFORCING = SelinuxFacts(
    is_enforcing=True,
    policy="targeted",
    has_mls=True,
    agent_label="system_u:system_r:svirt_t:s0",
    knows_label=True,
    is_label_taken=False,
)
PERMISSIVE = replace(ENFORCING, is_enforcing=False)
APPARMOR = ApparmorFacts(knows_profile=True)
PROFILE = "libvirt-11111111-2222-3333-4444-555555555555"


def of(check: str, inspection: Inspection) -> list[Finding]:
    return [f for f in security.judge(inspection) if f.check == check]


def worst(check: str, inspection: Inspection) -> Severity:
    found = {f.severity for f in of(check, inspection)}
    order = (Severity.REFUSED, Severity.WARNING, Severity.UNKNOWN, Severity.OK)
    return next(severity for severity in order if severity in found)


def pair(here: SecurityFacts, there: SecurityFacts, confinement: Confinement | None = None) -> Inspection:
    return replace(
        GOOD,
        guest=replace(FACTS, confinement=confinement or Confinement()),
        here=replace(HERE, security=here),
        there=replace(GOOD.there, security=there),
    )


# ------------------------------------------------------------------------ rules


def test_who_may_only_look_is_told_that_the_move_would_be_refused() -> None:
    denied = Permission(
        who="operator/eva", is_allowed=False, reason="operator/eva may not move guest to host-b"
    )
    inspection = pair(replace(secure(NOW_S), permission=denied), secure(NOW_S))
    assert {f.check for f in examine(inspection).of(Severity.REFUSED)} == {"allowed"}
    (refused,) = (f for f in of("allowed", inspection) if f.severity is Severity.REFUSED)
    assert refused.found == denied.reason


def test_a_source_that_asked_nobody_does_not_know_who_may() -> None:
    inspection = pair(replace(secure(NOW_S), permission=None), secure(NOW_S))
    assert worst("allowed", inspection) is Severity.UNKNOWN
    assert examine(inspection).is_passed


def test_a_destination_that_denies_is_one_finding_among_those_that_need_no_word_of_it() -> None:
    guest = replace(FACTS, blockers=("VFIO",), confinement=Confinement(is_confidential=True))
    denied = Unanswered(
        guest=guest,
        source_host="host-a",
        host="host-b",
        here=HERE,
        reason="agent/host-a may not send guest to host-b",
        is_denied=True,
    )
    report = examine_alone(denied)
    assert not report.is_passed
    assert {f.check for f in report.of(Severity.REFUSED)} == {"allowed", "guest-blocked", "confidential"}
    assert any("agent/host-a may not send" in problem for problem in report.problems)
    long = examine_alone(replace(denied, reason="x" * 100_000))
    assert all(len(f.found) <= 1000 for f in long.findings)


# ----------------------------------------------------------------- certificates


def ends_in(left_s: float, *, crl_s: float | None = None, ca_s: float = YEAR_S) -> SecurityFacts:
    facts = secure(NOW_S)
    if facts.certificates is None:
        raise AssertionError(facts)
    crl_at_s = None if crl_s is None else NOW_S + crl_s
    certificates = replace(
        facts.certificates,
        own_ends_at_s=NOW_S + left_s,
        ca_ends_at_s=NOW_S + ca_s,
        crl_ends_at_s=crl_at_s,
    )
    return replace(facts, certificates=certificates)


@pytest.mark.parametrize(
    ("left_s", "severity"),
    [
        (WARN_LEFT_S, Severity.OK),
        (WARN_LEFT_S - 1, Severity.WARNING),
        (MIN_LEFT_S, Severity.WARNING),
        (MIN_LEFT_S - 1, Severity.REFUSED),
        (0, Severity.REFUSED),
        (-1, Severity.REFUSED),
    ],
)
def test_certificates_must_outlast_the_move_at_either_end(left_s: float, severity: Severity) -> None:
    for here, there in ((ends_in(left_s), ends_in(YEAR_S)), (ends_in(YEAR_S), ends_in(left_s))):
        # Both ends are surveyed at the same moment here.
        inspection = pair(here, there)
        inspection = replace(inspection, there=replace(inspection.there, at_s=NOW_S))
        assert worst("certificates", inspection) is severity


def test_the_ca_and_the_revocation_list_end_as_well() -> None:
    for facts, word in (
        (ends_in(YEAR_S, ca_s=60), "the CA's certificate"),
        (ends_in(YEAR_S, crl_s=60), "the revocation list"),
        (ends_in(60, crl_s=61), "the certificate"),
    ):
        first, second = of("certificates", pair(facts, secure(NOW_S)))
        assert (first.severity, second.severity) == (Severity.REFUSED, Severity.OK)
        assert first.found.startswith(f"{word} of host-a ends in 1 min")


def test_a_move_that_has_all_but_ended_is_not_refused_for_the_last_hour() -> None:
    for left_s, severity in ((MIN_LEFT_UNDER_WAY_S, Severity.WARNING), (59, Severity.REFUSED)):
        inspection = replace(pair(ends_in(left_s), secure(NOW_S)), reserved_bytes=FACTS.ram_bytes)
        assert worst("certificates", inspection) is severity


def test_each_end_is_judged_by_its_own_clock() -> None:
    # The clock is a check of its own: a host that is ten days ahead has ten days less.
    ahead = replace(GOOD.there, at_s=NOW_S + YEAR_S, security=secure(NOW_S))
    assert worst("certificates", replace(GOOD, there=ahead)) is Severity.REFUSED


# ------------------------------------------------------------- what is encrypted


def test_ram_that_the_cpu_encrypts_is_refused() -> None:
    inspection = pair(secure(NOW_S), secure(NOW_S), Confinement(is_confidential=True))
    assert {f.check for f in examine(inspection).of(Severity.REFUSED)} == {"confidential"}


def test_the_way_is_always_encrypted() -> None:
    assert worst("encryption", GOOD) is Severity.OK


# -------------------------------------------------------------------- SELinux


def selinux(
    here: SelinuxFacts | None, there: SelinuxFacts | None, label: str = SVIRT
) -> tuple[Severity, str]:
    (finding,) = of(
        "selinux",
        pair(
            replace(secure(NOW_S), selinux=here),
            replace(secure(NOW_S), selinux=there),
            Confinement(selinux_label=label),
        ),
    )
    return finding.severity, finding.found


def test_the_same_policy_that_takes_the_label_is_in_order() -> None:
    severity, found = selinux(ENFORCING, ENFORCING)
    assert severity is Severity.OK
    assert SVIRT in found


@pytest.mark.parametrize(
    ("here", "there", "severity", "words"),
    [
        (None, None, Severity.OK, "neither"),
        (None, ENFORCING, Severity.WARNING, "no label"),
        (None, PERMISSIVE, Severity.OK, "only logs"),
        (ENFORCING, None, Severity.WARNING, "nothing would confine it"),
        (ENFORCING, PERMISSIVE, Severity.WARNING, "only logs what it forbids"),
        (PERMISSIVE, PERMISSIVE, Severity.OK, "takes"),
        (PERMISSIVE, ENFORCING, Severity.OK, "takes"),
        (ENFORCING, replace(ENFORCING, knows_label=False), Severity.REFUSED, "does not know that label"),
        (ENFORCING, replace(PERMISSIVE, knows_label=False), Severity.WARNING, "does not know that label"),
        (ENFORCING, replace(ENFORCING, is_label_taken=True), Severity.REFUSED, "same label and categories"),
        # Another policy that takes the label all the same.
        (ENFORCING, replace(ENFORCING, policy="mls"), Severity.OK, "mls"),
        # Nobody could ask it: then only the same one is believed.
        (ENFORCING, replace(ENFORCING, knows_label=None), Severity.OK, "takes"),
        (ENFORCING, replace(ENFORCING, knows_label=None, policy="mls"), Severity.REFUSED, "targeted"),
        (ENFORCING, replace(ENFORCING, knows_label=None, has_mls=False), Severity.REFUSED, "levels"),
        (
            ENFORCING,
            replace(ENFORCING, agent_label="system_u:system_r:unconfined_service_t:s0"),
            Severity.WARNING,
            "another type",
        ),
    ],
)
def test_what_selinux_would_do_there(
    here: SelinuxFacts | None, there: SelinuxFacts | None, severity: Severity, words: str
) -> None:
    assert selinux(here, there)[0] is severity
    assert words in selinux(here, there)[1]


# ------------------------------------------------------------------- AppArmor


def apparmor(there: ApparmorFacts | None, profile: str = PROFILE) -> Severity:
    return worst(
        "apparmor",
        pair(
            replace(secure(NOW_S), apparmor=APPARMOR),
            replace(secure(NOW_S), apparmor=there),
            Confinement(apparmor_profile=profile),
        ),
    )


def test_a_profile_must_be_loaded_there() -> None:
    assert apparmor(APPARMOR) is Severity.OK
    assert apparmor(replace(APPARMOR, knows_profile=False)) is Severity.REFUSED
    assert apparmor(replace(APPARMOR, knows_profile=None)) is Severity.UNKNOWN
    assert apparmor(None) is Severity.WARNING


def test_a_guest_that_no_profile_confines_needs_none() -> None:
    for there in (APPARMOR, replace(APPARMOR, knows_profile=None), None):
        assert apparmor(there, "") is Severity.OK


# -------------------------------------------------------- missing, and nonsense


def test_what_was_not_looked_at_is_unknown_and_stops_nothing() -> None:
    blind = replace(
        GOOD, guest=replace(FACTS, confinement=None), here=Survey(at_s=NOW_S), there=Survey(at_s=NOW_S)
    )
    report = examine(blind)
    assert report.is_passed
    checks = {check.check_id for check in security.CHECKS}
    assert {f.check for f in report.of(Severity.UNKNOWN)} & checks == checks - {"encryption"}


@pytest.mark.parametrize("word", ["", ":", "::::", "x" * 10_000, "a:b:c", "\0\n", "ä" * 300])
@pytest.mark.parametrize("end_s", [-1e308, 0.0, 1e308])
def test_nonsense_of_a_peer_breaks_no_check_and_makes_no_long_sentence(word: str, end_s: float) -> None:
    odd = SelinuxFacts(
        is_enforcing=True,
        policy=word,
        has_mls=False,
        agent_label=word,
        knows_label=None,
        is_label_taken=False,
    )
    facts = replace(
        ends_in(0, crl_s=end_s),
        selinux=odd,
        apparmor=ApparmorFacts(knows_profile=False),
    )
    inspection = pair(facts, facts, Confinement(selinux_label=word, apparmor_profile=word))
    report = examine(inspection)
    assert {f.check for f in report.findings} == {f.check for f in examine(GOOD).findings}
    assert all(len(f.found) < 1000 for f in report.findings)
