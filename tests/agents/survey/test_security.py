"""What is read of a host's security modules: from made-up kernels, and from this one's."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agents.hypervisors.confinement import has_selinux, profile_of, selinux_label_of
from agents.survey.security import PermittedSurvey, SecuritySurveyor, ask_kernel
from migrate.facts import (
    ApparmorFacts,
    CertificateFacts,
    Confinement,
    Permission,
    SecurityFacts,
    SelinuxFacts,
)
from tests.agents.survey.trees import Root, Tenants, machine
from tests.migrate.world import FACTS, FakeSurvey

pytestmark = pytest.mark.anyio

SVIRT = "system_u:system_r:svirt_t:s0:c12,c345"
ENDS = CertificateFacts(own_ends_at_s=1.0, ca_ends_at_s=2.0, crl_ends_at_s=None)


@dataclass
class Kernel:
    """SELinux's answer about labels, and what it was asked."""

    known: tuple[str, ...] = (SVIRT,)
    may_be_asked: bool = True
    asked: list[str] = field(default_factory=list)

    def __call__(self, context: Path, label: str) -> bool | None:
        assert context.name == "context"
        self.asked.append(label)
        return label in self.known if self.may_be_asked else None


def selinux_host(
    folder: Path, *, mode: str = "1", mls: str = "1", config: str = "SELINUXTYPE=targeted\n"
) -> Root:
    root = Root(folder)
    root.write("sys/fs/selinux/enforce", mode)
    root.write("sys/fs/selinux/mls", mls)
    root.write("sys/fs/selinux/policyvers", "33")
    root.write("etc/selinux/config", f"# made by anaconda\nSELINUX=enforcing\n{config}")
    root.write("proc/self/attr/current", "system_u:system_r:vmferry_t:s0\0")
    return root


def apparmor_host(folder: Path, profiles: str | None = None) -> Root:
    root = Root(folder)
    root.write("sys/module/apparmor/parameters/enabled", "Y\n")
    root.write("proc/self/attr/apparmor/current", "unconfined\n")
    if profiles is not None:
        root.write("sys/kernel/security/apparmor/profiles", profiles)
    return root


async def survey(
    root: Path, confinement: Confinement | None = None, *drivers: Tenants, kernel: Kernel | None = None
) -> SecurityFacts:
    surveyor = SecuritySurveyor(drivers, lambda: ENDS, root=root, knows_label=kernel or Kernel())
    return await surveyor.survey(replace(FACTS, confinement=confinement))


async def test_a_host_without_security_modules_has_none(tmp_path: Path) -> None:
    assert await survey(tmp_path) == SecurityFacts(selinux=None, apparmor=None, certificates=ENDS)


async def test_all_of_selinux_is_read(tmp_path: Path) -> None:
    kernel = Kernel()
    facts = await survey(selinux_host(tmp_path).folder, Confinement(selinux_label=SVIRT), kernel=kernel)
    assert facts.selinux == SelinuxFacts(
        is_enforcing=True,
        policy="targeted",
        has_mls=True,
        agent_label="system_u:system_r:vmferry_t:s0",
        knows_label=True,
        is_label_taken=False,
    )
    assert kernel.asked == [SVIRT]


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        ("SELINUXTYPE=mls\n", "mls"),
        (' SELINUXTYPE = "minimum" \n', "minimum"),
        ("#SELINUXTYPE=x\n", ""),
        ("", ""),
    ],
)
async def test_the_policy_is_that_of_its_configuration(tmp_path: Path, config: str, policy: str) -> None:
    root = selinux_host(tmp_path, mode="0", mls="0", config=config)
    facts = (await survey(root.folder)).selinux
    assert facts is not None
    assert (facts.is_enforcing, facts.policy, facts.has_mls) == (False, policy, False)
    # There was no label to ask about.
    assert facts.knows_label is None


async def test_a_kernel_that_may_not_be_asked_leaves_it_open(tmp_path: Path) -> None:
    root = selinux_host(tmp_path)
    kernel = Kernel(may_be_asked=False)
    facts = await survey(root.folder, Confinement(selinux_label=SVIRT), kernel=kernel)
    assert facts.selinux is not None
    assert facts.selinux.knows_label is None


@pytest.mark.parametrize("label", ["a b", "x" * 256, "../../etc", "a\0b", "a\nb", "ä:b:c:s0"])
async def test_the_kernel_is_never_asked_about_what_is_no_label(tmp_path: Path, label: str) -> None:
    kernel = Kernel(known=(label,))
    facts = await survey(selinux_host(tmp_path).folder, Confinement(selinux_label=label), kernel=kernel)
    assert kernel.asked == []
    assert facts.selinux is not None
    assert facts.selinux.knows_label is False


async def test_categories_of_its_own_are_taken_where_another_guest_has_them(tmp_path: Path) -> None:
    root = selinux_host(tmp_path)
    root.write("proc/7/attr/current", f"{SVIRT}\0")
    root.write("proc/8/attr/current", "system_u:system_r:svirt_t:s0\0")
    others = Tenants((machine("a", pid=8), machine("b", pid=7), machine("gone", pid=9)))
    for label, driver, is_taken in (
        (SVIRT, others, True),
        # Its own machine, made for it here.
        (SVIRT, Tenants((machine(FACTS.guest_id, pid=7),)), False),
        ("system_u:system_r:svirt_t:s0:c12,c346", others, False),
        # Nobody's own: all guests without categories share it.
        ("system_u:system_r:svirt_t:s0", others, False),
        ("system_u:system_r:svirt_t:s0-s0:c0.c1023", others, False),
    ):
        facts = (await survey(root.folder, Confinement(selinux_label=label), driver)).selinux
        assert facts is not None
        assert facts.is_label_taken is is_taken


def test_an_invalid_context_is_what_the_kernel_calls_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask_kernel(tmp_path / "none", SVIRT) is None
    context = tmp_path / "context"
    context.write_bytes(b"")
    assert ask_kernel(context, SVIRT) is True

    def refuse(*_: object, **__: object) -> object:
        raise OSError(errno.EINVAL, "invalid")

    monkeypatch.setattr(Path, "open", refuse)
    assert ask_kernel(context, SVIRT) is False


async def test_a_profile_is_known_by_its_whole_name(tmp_path: Path) -> None:
    loaded = "/usr/sbin/tcpdump (enforce)\nlibvirt-1 (enforce)\nodd (name) (complain)\n"
    root = apparmor_host(tmp_path, loaded)
    for name, knows in (("libvirt-1", True), ("odd (name)", True), ("libvirt", False), ("libvirt-11", False)):
        facts = await survey(root.folder, Confinement(apparmor_profile=name))
        assert facts.apparmor == ApparmorFacts(knows_profile=knows)


async def test_profiles_that_cannot_be_read_are_not_known(tmp_path: Path) -> None:
    root = apparmor_host(tmp_path)
    facts = await survey(root.folder, Confinement(apparmor_profile="libvirt-1"))
    assert facts.apparmor == ApparmorFacts(knows_profile=None)


@pytest.mark.parametrize(
    ("line", "profile"),
    [
        ("unconfined\n", ""),
        ("libvirt-1 (enforce)\n", "libvirt-1"),
        ("libvirt-1 (complain)\n", "libvirt-1"),
        ("unconfined (unconfined)\n", ""),
        ("a (b) (enforce)\n", "a (b)"),
        ("", ""),
    ],
)
def test_the_profile_of_a_process(tmp_path: Path, line: str, profile: str) -> None:
    root = apparmor_host(tmp_path)
    root.write("proc/42/attr/current", line)
    assert profile_of(42, tmp_path) == profile
    root.write("proc/42/attr/apparmor/current", line)
    assert profile_of(42, tmp_path) == profile


def test_where_a_module_is_off_a_process_has_no_word_of_it(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.write("proc/42/attr/current", f"{SVIRT}\0")
    assert (selinux_label_of(42, tmp_path), profile_of(42, tmp_path)) == ("", "")
    # With both, `current` is a label and not a profile.
    selinux_host(tmp_path)
    root.write("sys/module/apparmor/parameters/enabled", "Y\n")
    assert (selinux_label_of(42, tmp_path), profile_of(42, tmp_path)) == (SVIRT, "")
    root.write("sys/module/apparmor/parameters/enabled", "N\n")
    assert selinux_label_of(41, tmp_path) == ""


async def test_this_very_host_is_read() -> None:
    facts = await survey(Path("/"))
    assert (facts.selinux is not None) is has_selinux()
    assert (facts.selinux is None) or facts.selinux.agent_label
    assert selinux_label_of(os.getpid()) == selinux_label_of("self")


async def test_a_source_adds_what_its_rules_say() -> None:
    permission = Permission(who="operator/eva", is_allowed=False, reason="no")
    seen = await PermittedSurvey(FakeSurvey(), permission).survey(FACTS)
    assert seen.security is not None
    assert seen.security.permission == permission
    assert seen.security.certificates is not None
