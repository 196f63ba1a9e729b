"""The CPU of a libvirt guest, from what `virsh dumpxml` prints."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from migrate.cpudomain import read_domain_cpu
from migrate.cpufiles import MAX_FEATURES, MAX_FILE_BYTES, CpuFileInvalid
from tests.agents.host.fleet import scratch_folder
from tests.agents.libvirts import LIBVIRTD, running_libvirt

# As libvirt 9 prints a guest that runs.
RUNNING = b"""<domain type='qemu' id='1'>
  <name>web2</name>
  <metadata><app><name>not mine</name><cpu mode='host-passthrough'/></app></metadata>
  <cpu mode='custom' match='exact' check='full'>
    <model fallback='forbid'>Nehalem</model>
    <vendor>Intel</vendor>
    <feature policy='require' name='lahf_lm'/>
    <feature policy='force' name='aes'/>
    <feature policy='disable' name='popcnt'/>
    <feature policy='forbid' name='hle'/>
    <feature policy='optional' name='avx'/>
  </cpu>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices>
</domain>
"""
MODELS = {"Nehalem": frozenset({"sse2", "popcnt"}), "Haswell": frozenset({"avx"})}


def domain_with(cpu: bytes) -> bytes:
    return b"<domain><name>g</name>" + cpu + b"</domain>"


def test_a_guest_that_runs_has_its_model_and_what_differs_from_it() -> None:
    cpu = read_domain_cpu(RUNNING)
    assert (cpu.domain, cpu.model, cpu.vendor, cpu.mode, cpu.check) == (
        "web2",
        "Nehalem",
        "Intel",
        "custom",
        "full",
    )
    # In the spelling of everything else.
    assert (cpu.added, cpu.removed) == (("aes", "lahf-lm"), ("hle", "popcnt"))
    assert cpu.problem == ""
    assert cpu.features(MODELS) == frozenset({"sse2", "aes", "lahf-lm"})
    assert cpu.features({}) is None


@pytest.mark.parametrize(
    ("cpu", "words"),
    [
        (b"<cpu mode='host-passthrough' check='none'/>", "depends on its host"),
        (b"<cpu mode='maximum'/>", "CPU mode maximum"),
        (b"<cpu mode='host-model'/>", "CPU mode host-model"),
        (b"<cpu><topology sockets='1' cores='1' threads='1'/></cpu>", "no CPU model"),
    ],
)
def test_a_cpu_that_the_xml_does_not_tell_is_said_to_be_so(cpu: bytes, words: str) -> None:
    assert words in read_domain_cpu(domain_with(cpu)).problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not XML"),
        (b"<domain><name>g</name></domain>", "no <cpu>"),
        (b"<cpus><model name='A'/></cpus>", "with <domain>"),
        (b"<domain><cpu>", "not XML"),
        (b"<!DOCTYPE a [<!ENTITY b 'c'>]><domain><cpu/></domain>", "document type"),
        (domain_with(b"<cpu><feature name='a b'/></cpu>"), "no name of a feature"),
        (domain_with(b"<cpu><model>a b</model></cpu>"), "no name of a model"),
        (domain_with(b"<a>" * 20 + b"</a>" * 20), "more than 16 others"),
        (b" " * (MAX_FILE_BYTES + 1), "are the most"),
        (
            domain_with(
                b"<cpu>" + b"".join(b"<feature name='f%d'/>" % n for n in range(MAX_FEATURES + 1)) + b"</cpu>"
            ),
            "more than 1000 features",
        ),
    ],
)
def test_what_libvirt_does_not_print_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(CpuFileInvalid, match=words):
        read_domain_cpu(content)


def test_a_name_has_a_limit() -> None:
    long_name = b"<domain><name>" + b"n" * 5000 + b"</name><cpu><model>Nehalem</model></cpu></domain>"
    assert len(read_domain_cpu(long_name).domain) == 256


@pytest.mark.slow
@pytest.mark.skipif(
    LIBVIRTD is None or shutil.which("virsh") is None or shutil.which("qemu-system-x86_64") is None,
    reason="needs libvirt-daemon, libvirt-daemon-driver-qemu, libvirt-clients and qemu-system-x86",
)
def test_a_real_libvirt_writes_out_the_cpu_of_a_guest_that_runs() -> None:
    xml = f"""<domain type='qemu'><name>web2</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type></os>
      <cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Nehalem</model>
        <feature policy='require' name='aes'/><feature policy='disable' name='popcnt'/></cpu>
      <devices><emulator>{shutil.which("qemu-system-x86_64")}</emulator></devices></domain>"""
    with scratch_folder() as folder, running_libvirt(folder) as uri:

        def virsh(*words: str) -> bytes:
            command = ["virsh", "--quiet", "--connect", uri, *words]
            return subprocess.run(
                command, input=xml.encode(), capture_output=True, check=True, timeout=60
            ).stdout

        virsh("create", "/dev/stdin")
        try:
            cpu = read_domain_cpu(virsh("dumpxml", "web2"))
        finally:
            virsh("destroy", "web2")
    assert (cpu.domain, cpu.model, cpu.check, cpu.problem) == ("web2", "Nehalem", "full", "")
    assert "aes" in cpu.added
    assert "popcnt" in cpu.removed
