"""Protection: what confines a guest, what a host would confine it with, and who may move it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ApparmorFacts",
    "CertificateFacts",
    "Confinement",
    "Permission",
    "SecurityFacts",
    "SelinuxFacts",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What a guest's process runs under at the source; empty where there is none.

    `is_confidential`: its RAM is encrypted by the CPU (SEV, TDX), so that nobody can copy it.
    """

    is_confidential: bool = False
    selinux_label: str = ""
    apparmor_profile: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelinuxFacts:
    """SELinux of a host where it is on. `agent_label` is what machines that the agent starts come from.

    `knows_label`: the policy that is loaded takes the guest's label (None: the agent may not ask it).
    `is_label_taken`: another guest here runs with the same label and the same categories of its own.
    """

    is_enforcing: bool
    policy: str
    has_mls: bool
    agent_label: str
    knows_label: bool | None
    is_label_taken: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ApparmorFacts:
    """AppArmor of a host where it is on. `knows_profile`: the guest's is loaded (None: the list cannot be read)."""

    knows_profile: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFacts:
    """When an agent's own certificate, its CA's, and its revocation list end, in Unix time; None: it has no list."""

    own_ends_at_s: float
    ca_ends_at_s: float
    crl_ends_at_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Permission:
    """What the rules of the source say of who asks for the move. `reason` is the sentence for who is denied."""

    who: str
    is_allowed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityFacts:
    """One host. `selinux` and `apparmor` are None where they are off, the others where they were not asked for."""

    selinux: SelinuxFacts | None
    apparmor: ApparmorFacts | None
    certificates: CertificateFacts | None = None
    permission: Permission | None = None
