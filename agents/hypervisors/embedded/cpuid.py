"""What a CPU model of the emulator can do: asked of that CPU, by running CPUID on it.

Law: nothing is listed here but the names of bits. Source: the names are QEMU's (target/i386/cpu.c,
feature_word_info), the places are of Intel's and AMD's manuals (CPUID).
"""

from __future__ import annotations

import functools
import struct
from types import MappingProxyType
from typing import Final

from agents.hypervisors.embedded.cpu import new_cpu, register_number
from agents.hypervisors.embedded.ramfile import RamFile
from agents.hypervisors.embedded.spec import CPU_MODELS, PAGE_BYTES
from migrate.facts import CpuFacts

__all__ = [
    "FEATURE_NAMES",
    "facts_of_model",
    "family_model_stepping",
    "features_of_bits",
    "features_of_model",
]

# (leaf, subleaf, register) -> names from bit 0 on; "-" has no name here.
FEATURE_NAMES: Final = MappingProxyType(
    {
        (0x1, 0, "edx"): (
            "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov"
            " pat pse36 pn clflush - ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
        ),
        (0x1, 0, "ecx"): (
            "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm"
            " - pcid dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave osxsave avx f16c rdrand hypervisor"
        ),
        (0x7, 0, "ebx"): (
            "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - zero-fcs-fds mpx -"
            " avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf avx512er avx512cd"
            " sha-ni avx512bw avx512vl"
        ),
        (0x7, 0, "ecx"): (
            "- avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg"
            " - avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks"
        ),
        (0x7, 0, "edx"): (
            "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize -"
            " tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d"
            " arch-capabilities core-capability ssbd"
        ),
        (0x7, 1, "eax"): "- - - - avx-vnni avx512-bf16",
        (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
        (0x80000001, 0, "edx"): (
            "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
        ),
        (0x80000001, 0, "ecx"): (
            "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt"
            " - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb"
        ),
        (0x80000007, 0, "edx"): "- - - - - - - - invtsc",
        (0x80000008, 0, "ebx"): (
            "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp"
            " - stibp-always-on - - - - - - amd-ssbd virt-ssbd amd-no-ssb - amd-psfd"
        ),
    }
)

# What a CPU says of itself beside its features: its maker, its signature.
_IDENTITY: Final = ((0, 0, "ebx"), (0, 0, "edx"), (0, 0, "ecx"), (1, 0, "eax"))
# mov eax, leaf; mov ecx, subleaf; cpuid
_CODE_BYTES: Final = 12
_OUT_OF_REGISTER: Final = MappingProxyType({"eax": "EAX", "ebx": "EBX", "ecx": "ECX", "edx": "EDX"})


def features_of_model(cpu_model: str) -> tuple[str, ...]:
    """Give the names of what this model can do, sorted; otherwise as `facts_of_model`."""
    return facts_of_model(cpu_model).features


@functools.cache
def facts_of_model(cpu_model: str) -> CpuFacts:
    """Give what a model is to a guest that runs CPUID on it. Blocking: some milliseconds, the first time.

    Raises:
        KeyError: ours: no such model.
    """
    ram = RamFile(PAGE_BYTES)
    try:
        cpu = new_cpu(CPU_MODELS[cpu_model], ram.address, ram.ram_bytes)
        registers: dict[tuple[int, int, str], int] = {}
        highest: dict[int, int] = {}
        for leaf, subleaf, register in (*_IDENTITY, *FEATURE_NAMES):
            base = leaf & 0x80000000
            for asked, sub in ((base, 0), (leaf, subleaf)):
                code = (
                    b"\xb8" + asked.to_bytes(4, "little") + b"\xb9" + sub.to_bytes(4, "little") + b"\x0f\xa2"
                )
                ram.write(0, code)
                cpu.ctl_flush_tb()
                cpu.emu_start(0, _CODE_BYTES)
                if asked == base:
                    highest[base] = _read(cpu.reg_read(register_number("EAX")))
            # A leaf beyond the highest gives another leaf's values.
            is_there = leaf <= highest[base]
            value = _read(cpu.reg_read(register_number(_OUT_OF_REGISTER[register])))
            registers[leaf, subleaf, register] = value if is_there else 0
    finally:
        ram.close()
    words = struct.pack("=3I", *(registers[0, 0, name] for name in ("ebx", "edx", "ecx")))
    family, number, stepping = family_model_stepping(registers[1, 0, "eax"])
    return CpuFacts(
        model=cpu_model,
        features=features_of_bits(registers),
        vendor=words.rstrip(b"\0").decode("ascii", "replace"),
        family=family,
        number=number,
        stepping=stepping,
        level=highest[0],
        xlevel=highest[0x80000000],
    )


def family_model_stepping(signature: int) -> tuple[int, int, int]:
    """Read EAX of CPUID's leaf 1. Source: Intel's manual, volume 2A, CPUID, figure 3-6."""
    family, number = signature >> 8 & 0xF, signature >> 4 & 0xF
    if family in (6, 15):
        number |= (signature >> 16 & 0xF) << 4
    if family == 15:
        family += signature >> 20 & 0xFF
    return family, number, signature & 0xF


def features_of_bits(registers: dict[tuple[int, int, str], int]) -> tuple[str, ...]:
    """Give the names of the bits that are set, sorted; registers without names are left out."""
    names: set[str] = set()
    for place, value in registers.items():
        for bit, name in enumerate(FEATURE_NAMES.get(place, "").split()):
            if name != "-" and value >> bit & 1:
                names.add(name)
    return tuple(sorted(names))


def _read(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else 0
