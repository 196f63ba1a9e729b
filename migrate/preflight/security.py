"""Protection on the way and at the destination: who may, what confines the guest, and what proves the hosts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from migrate.facts import CertificateFacts, GuestFacts, Permission, SelinuxFacts, Survey
from migrate.preflight.evidence import Denied, Inspection
from migrate.preflight.report import Check, Finding

__all__ = [
    "ALLOWED",
    "APPARMOR",
    "CERTIFICATES",
    "CHECKS",
    "CONFIDENTIAL",
    "ENCRYPTION",
    "MIN_LEFT_S",
    "MIN_LEFT_UNDER_WAY_S",
    "SELINUX",
    "WARN_LEFT_S",
    "judge",
    "judge_denied",
]

ALLOWED: Final = Check(
    check_id="allowed",
    asked="May who asks move this guest there, and may the source bring it?",
    why="What no [[allow]] of a host's configuration allows is refused when the move is begun",
    remedy="Add a rule to [[allow]] on that host, or ask somebody who may",
)
CERTIFICATES: Final = Check(
    check_id="certificates",
    asked="Will the certificates of both agents outlast the move?",
    why="A connection that breaks is made anew, and nobody lets in whose certificate has ended",
    remedy="Put a new one in its place; the agent takes it without a restart",
)
ENCRYPTION: Final = Check(
    check_id="encryption",
    asked="Is the guest's RAM encrypted on its way?",
    why="It holds everything that the guest knows, keys and passwords included",
    remedy="Nothing is needed",
)
CONFIDENTIAL: Final = Check(
    check_id="confidential",
    asked="Can the guest's RAM be read at all?",
    why="RAM that the CPU encrypts (SEV, TDX) is noise to everybody else, and the key does not leave the CPU",
    remedy="Shut it down and start it on the other host",
)
SELINUX: Final = Check(
    check_id="selinux",
    asked="Can SELinux confine the guest at the destination as it does at the source?",
    why="What confines a guest protects its host and the other guests from it",
    remedy="Give both hosts the same policy in the same mode",
)
APPARMOR: Final = Check(
    check_id="apparmor",
    asked="Can AppArmor confine the guest at the destination as it does at the source?",
    why="What confines a guest protects its host and the other guests from it",
    remedy="Load the same profile there (apparmor_parser)",
)
CHECKS: Final = (ALLOWED, CERTIFICATES, ENCRYPTION, CONFIDENTIAL, SELINUX, APPARMOR)

_DAY_S: Final = 86400.0
# As long as an agent's log warns of: who issues certificates by hand needs a week, and has another one then.
WARN_LEFT_S: Final = 14 * _DAY_S
# What has left less than this may end before a large guest is over, with links that must be made anew.
MIN_LEFT_S: Final = 3600.0
# All but the last round has gone already: connections stand, and there are seconds left to go.
MIN_LEFT_UNDER_WAY_S: Final = 60.0
# Labels and names come from a peer.
_MAX_WORD: Final = 128


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge rules, certificates, and what confines the guest."""
    host, source = inspection.host.name, inspection.source_host
    yield from _permission(inspection.here, inspection.guest, source)
    yield ALLOWED.ok(f"{host} lets {source} bring {inspection.guest.name}")
    is_under_way = inspection.reserved_bytes > 0
    yield _certificates(source, inspection.here, is_under_way=is_under_way)
    yield _certificates(host, inspection.there, is_under_way=is_under_way)
    yield ENCRYPTION.ok("pages travel in AES-256-GCM with keys of this move alone, all else in TLS 1.3")
    yield _confidential(inspection.guest, source)
    yield _selinux(inspection)
    yield _apparmor(inspection)


def judge_denied(denied: Denied) -> Iterator[Finding]:
    """Judge what the source alone knows; the destination's rules have said no."""
    yield from _permission(denied.here, denied.guest, denied.source_host)
    yield ALLOWED.refused(
        denied.reason, f"Add a rule for agents to [[allow]] there: {denied.source_host} may not"
    )
    yield _certificates(denied.source_host, denied.here, is_under_way=False)
    yield _confidential(denied.guest, denied.source_host)


def _permission(here: Survey, guest: GuestFacts, source: str) -> Iterator[Finding]:
    permission = here.security.permission if here.security else None
    if permission is None:
        yield ALLOWED.unknown(f"{source} was not asked who may move {guest.name}")
    else:
        yield _permitted(permission, guest)


def _permitted(permission: Permission, guest: GuestFacts) -> Finding:
    if permission.is_allowed:
        return ALLOWED.ok(f"{permission.who} may move {guest.name}")
    return ALLOWED.refused(permission.reason)


# ---------------------------------------------------------------- certificates


def _certificates(host: str, survey: Survey, *, is_under_way: bool) -> Finding:
    """Judge the ends by the clock of the host that they are of."""
    facts = survey.security.certificates if survey.security else None
    if facts is None:
        return CERTIFICATES.unknown(f"{host} does not say when its certificates end")
    what, left_s = _first_end(facts, survey.at_s)
    if left_s <= 0:
        return CERTIFICATES.refused(f"{what} of {host} has ended")
    found = f"{what} of {host} ends in {_span(left_s)}, before anything else that proves it"
    if left_s < (MIN_LEFT_UNDER_WAY_S if is_under_way else MIN_LEFT_S):
        return CERTIFICATES.refused(found)
    return CERTIFICATES.warning(found) if left_s < WARN_LEFT_S else CERTIFICATES.ok(found)


def _first_end(facts: CertificateFacts, at_s: float) -> tuple[str, float]:
    ends = [("the certificate", facts.own_ends_at_s), ("the CA's certificate", facts.ca_ends_at_s)]
    if facts.crl_ends_at_s is not None:
        ends.append(("the revocation list", facts.crl_ends_at_s))
    what, end_s = min(ends, key=lambda one: one[1])
    return what, end_s - at_s


def _span(seconds: float) -> str:
    if seconds >= 2 * _DAY_S:
        return f"{seconds / _DAY_S:.0f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{math.ceil(seconds / 60)} minutes"


# ----------------------------------------------------------------- confinement


def _confidential(guest: GuestFacts, source: str) -> Finding:
    if guest.confinement is None:
        return CONFIDENTIAL.unknown(f"{source} does not say whether the RAM of {guest.name} is encrypted")
    if guest.confinement.is_confidential:
        return CONFIDENTIAL.refused(f"the CPU of {source} encrypts the RAM of {guest.name}")
    return CONFIDENTIAL.ok(f"the RAM of {guest.name} can be read on {source}")


def _selinux(inspection: Inspection) -> Finding:
    guest, host, source = inspection.guest, inspection.host.name, inspection.source_host
    if inspection.here.security is None or inspection.there.security is None or guest.confinement is None:
        return SELINUX.unknown(f"{source} and {host} do not both say what SELinux does there")
    here, there = inspection.here.security.selinux, inspection.there.security.selinux
    label = guest.confinement.selinux_label
    if here is None:
        if there is None:
            return SELINUX.ok(f"neither {source} nor {host} uses SELinux")
        found = f"{source} has no SELinux, and {host} has: files that {source} makes have no label there"
        return SELINUX.warning(found) if there.is_enforcing else SELINUX.ok(f"{found}, and it only logs")
    runs_as = f"{guest.name} runs as {_word(label) or 'nothing'} on {source}"
    if there is None:
        return SELINUX.warning(f"{runs_as}, and {host} has no SELinux: nothing would confine it there")
    if (objection := _against_label(label, here, there, host)) is not None:
        if there.is_enforcing:
            return SELINUX.refused(f"{runs_as}: {objection}")
        return SELINUX.warning(f"{runs_as}: {objection}; {host} only logs that")
    if here.is_enforcing and not there.is_enforcing:
        return SELINUX.warning(f"{source} enforces its policy, and {host} only logs what it forbids")
    if label and _type_of(label) != _type_of(there.agent_label):
        return SELINUX.warning(
            f"{runs_as}, and machines that the agent on {host} starts come from {_word(there.agent_label)}: it would "
            "be confined by another type there",
            "Give the agent there a policy that moves its machines to that type",
        )
    return SELINUX.ok(f"{runs_as}, which the policy {_word(there.policy)} on {host} takes")


def _against_label(label: str, here: SelinuxFacts, there: SelinuxFacts, host: str) -> str | None:
    """Say why a label cannot be used there. Where the policy could not be asked, both policies must be the same."""
    if not label:
        return None
    if there.knows_label is False:
        return f"the policy {_word(there.policy)} on {host} does not know that label"
    if there.is_label_taken:
        return f"another guest on {host} has the same label and categories, so that each could open the other's files"
    if there.knows_label is None and here.policy != there.policy:
        return f"the policies are {_word(here.policy)} and, on {host}, {_word(there.policy)}"
    if there.knows_label is None and here.has_mls != there.has_mls:
        return f"only one of the policies has levels and categories; the other is that of {host}"
    return None


def _apparmor(inspection: Inspection) -> Finding:
    guest, host, source = inspection.guest, inspection.host.name, inspection.source_host
    if inspection.here.security is None or inspection.there.security is None or guest.confinement is None:
        return APPARMOR.unknown(f"{source} and {host} do not both say what AppArmor does there")
    here, there = inspection.here.security.apparmor, inspection.there.security.apparmor
    profile = guest.confinement.apparmor_profile
    if not profile:
        if here is None and there is None:
            return APPARMOR.ok(f"neither {source} nor {host} uses AppArmor")
        return APPARMOR.ok(f"no profile confines {guest.name} on {source}")
    runs_as = f"{guest.name} runs under the profile {_word(profile)} on {source}"
    if there is None:
        return APPARMOR.warning(
            f"{runs_as}, and {host} has no AppArmor: nothing would confine it there",
            "Boot it with AppArmor, and load the profile",
        )
    if there.knows_profile is None:
        return APPARMOR.unknown(
            f"{runs_as}, and the agent on {host} cannot read which profiles are loaded there",
            "Let the agent read /sys/kernel/security/apparmor/profiles",
        )
    if not there.knows_profile:
        return APPARMOR.refused(f"{runs_as}, which is not loaded on {host}")
    return APPARMOR.ok(f"{runs_as}, which is loaded on {host}")


def _type_of(label: str) -> str:
    parts = label.split(":")
    return parts[2] if len(parts) > 2 else ""


def _word(text: str) -> str:
    return text[:_MAX_WORD]
