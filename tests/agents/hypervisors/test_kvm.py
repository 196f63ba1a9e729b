from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.hypervisors.embedded.cpuid import family_model_stepping
from agents.hypervisors.kvm import KVM_DEVICE, MAX_ENTRIES, KvmCpu, cpu_of_entries, kvm_cpu

# Four of the 61 entries that Linux 6.18 answered on an AMD EPYC: leaves 0, 1, 7.0, 0x80000001.
GOLDEN = bytes.fromhex(
    "0400000000000000"
    "000000000000000000000000100000004175746863414d44656e7469000000000000000000000000"
    "010000000000000000000000110fa0000008020100202081fffb8b07000000000000000000000000"
    "070000000000000001000000000000000200800104000000000000a8000000000000000000000000"
    "010000800000000000000000110fa0000000004093034000fffbd323000000000000000000000000"
)


def test_golden_bytes_are_a_cpu() -> None:
    vendor, signature, features = cpu_of_entries(GOLDEN)
    assert (vendor, family_model_stepping(signature)) == ("AuthenticAMD", (25, 1, 1))
    assert {"cx16", "x2apic", "tsc-adjust", "clwb", "umip", "stibp", "ssbd", "lm", "nx", "topoext"} <= set(
        features
    )
    assert not {"avx", "avx2", "svm"} & set(features)


@pytest.mark.parametrize(
    ("signature", "numbers"),
    [(0x306C3, (6, 60, 3)), (0xA00F11, (25, 1, 1)), (0x543, (5, 4, 3)), (0, (0, 0, 0))],
)
def test_a_signature_is_family_model_and_stepping(signature: int, numbers: tuple[int, int, int]) -> None:
    assert family_model_stepping(signature) == numbers


def test_an_answer_that_is_shorter_than_it_says_is_refused() -> None:
    assert cpu_of_entries(bytes(8)) == ("", 0, ())
    for answer in (b"", GOLDEN[:-1], struct.pack("=II", MAX_ENTRIES + 1, 0) + bytes(40 * (MAX_ENTRIES + 1))):
        with pytest.raises(ValueError, match=r"entries|header"):
            cpu_of_entries(answer)


@given(st.binary(max_size=400), st.integers(0, 9))
def test_garbage_is_a_cpu_or_a_value_error(body: bytes, count: int) -> None:
    try:
        cpu_of_entries(struct.pack("=II", count, 0) + body)
    except ValueError:
        return


def test_where_there_is_no_kvm_nothing_is_known(tmp_path: Path) -> None:
    assert kvm_cpu(tmp_path / "kvm") == KvmCpu()
    (tmp_path / "file").write_bytes(b"no device")
    assert kvm_cpu(tmp_path / "file") == KvmCpu()


@pytest.mark.skipif(not os.access(KVM_DEVICE, os.R_OK | os.W_OK), reason="this machine has no KVM")
def test_this_hosts_kvm_knows_its_cpu() -> None:
    before = set(os.listdir("/proc/self/fd"))
    cpu = kvm_cpu()
    assert set(os.listdir("/proc/self/fd")) == before
    if cpu.vendor:
        assert cpu.vendor.isprintable()
        assert {"fpu", "sse2"} <= set(cpu.features)
        assert cpu.tsc_khz == 0 or cpu.tsc_khz > 100_000
