"""Protection on this host: SELinux, AppArmor, when the agent's certificates end, and what the rules say of who asks.

Law: reads files below `root` in a worker thread; judges nothing. A label comes from a peer: the kernel is asked about
it only if it is made of what labels are made of.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio.to_thread

from agents.hypervisors.confinement import ROOT, has_apparmor, has_selinux, selinux_label_of
from agents.hypervisors.inhabitants import Inhabited
from agents.kernelfiles import text_of
from migrate.facts import (
    ApparmorFacts,
    CertificateFacts,
    Confinement,
    GuestFacts,
    Permission,
    SecurityFacts,
    SelinuxFacts,
    Survey,
)
from migrate.ports import HostSurvey

__all__ = ["PermittedSurvey", "SecuritySurveyor", "ask_kernel"]

_LABEL: Final = re.compile(r"[A-Za-z0-9_.,:-]{1,255}", re.ASCII)
# Two or more single categories: what sVirt gives to one guest alone. A range or a bare level is shared.
_OWN_CATEGORIES: Final = re.compile(r":s\d+:c\d+(,c\d+)+\Z", re.ASCII)
# A host with a thousand containers has less than a mebibyte of names.
_MAX_PROFILES_BYTES: Final = 4 << 20


def ask_kernel(context: Path, label: str) -> bool | None:
    """Ask SELinux whether its policy takes a label; changes nothing. None: this process may not ask."""
    try:
        with context.open("r+b", buffering=0) as file:
            file.write(label.encode())
    except OSError as exc:
        return False if exc.errno == errno.EINVAL else None
    return True


class SecuritySurveyor:
    """Looks at what protects this host and its guests."""

    def __init__(
        self,
        drivers: Sequence[Inhabited],
        certificates: Callable[[], CertificateFacts | None],
        *,
        root: Path = ROOT,
        knows_label: Callable[[Path, str], bool | None] = ask_kernel,
    ) -> None:
        self._drivers = drivers
        self._certificates = certificates
        self._root = root
        self._knows_label = knows_label

    async def survey(self, guest: GuestFacts) -> SecurityFacts:
        """Look at this host with that guest's label and profile in mind; both are hostile."""
        confinement = guest.confinement or Confinement()
        others: list[int] = []
        if _OWN_CATEGORIES.search(confinement.selinux_label):
            for driver in self._drivers:
                others += [one.pid for one in await driver.inhabitants() if one.guest_id != guest.guest_id]
        selinux, apparmor = await anyio.to_thread.run_sync(self._read, confinement, others)
        return SecurityFacts(selinux=selinux, apparmor=apparmor, certificates=self._certificates())

    def _read(
        self, confinement: Confinement, others: Sequence[int]
    ) -> tuple[SelinuxFacts | None, ApparmorFacts | None]:
        root = self._root
        selinux = self._selinux(confinement.selinux_label, others) if has_selinux(root) else None
        apparmor = self._apparmor(confinement.apparmor_profile) if has_apparmor(root) else None
        return selinux, apparmor

    def _selinux(self, label: str, others: Sequence[int]) -> SelinuxFacts:
        root = self._root
        knows_label = None
        if label:
            is_label = _LABEL.fullmatch(label) is not None
            knows_label = is_label and self._knows_label(root / "sys/fs/selinux/context", label)
        return SelinuxFacts(
            is_enforcing=text_of(root / "sys/fs/selinux/enforce").strip() == "1",
            policy=_policy_of(text_of(root / "etc/selinux/config")),
            has_mls=text_of(root / "sys/fs/selinux/mls").strip() == "1",
            agent_label=selinux_label_of("self", root),
            knows_label=knows_label,
            is_label_taken=any(selinux_label_of(pid, root) == label for pid in others),
        )

    def _apparmor(self, profile: str) -> ApparmorFacts:
        loaded = text_of(self._root / "sys/kernel/security/apparmor/profiles", _MAX_PROFILES_BYTES)
        knows_profile = None
        if profile and loaded:
            # "NAME (MODE)" each.
            knows_profile = any(line.rpartition(" (")[0] == profile for line in loaded.splitlines())
        return ApparmorFacts(knows_profile=knows_profile)


class PermittedSurvey:
    """`migrate.ports.HostSurvey` of a source, with what its rules say of who asks."""

    def __init__(self, survey: HostSurvey, permission: Permission) -> None:
        self._survey = survey
        self._permission = permission

    async def survey(self, guest: GuestFacts) -> Survey:
        seen = await self._survey.survey(guest)
        security = seen.security or SecurityFacts(selinux=None, apparmor=None)
        return replace(seen, security=replace(security, permission=self._permission))


def _policy_of(config: str) -> str:
    """Give SELINUXTYPE of /etc/selinux/config."""
    for line in config.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "SELINUXTYPE":
            return value.strip().strip("\"'")
    return ""
