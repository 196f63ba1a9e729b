"""What this kernel's KVM says of the host's CPU: its maker and model, the features it can give, its time stamp counter.

Law: opens /dev/kvm and asks; makes a virtual machine without memory for the one question that needs one, and closes it.
Blocking, some 10 ms. Where there is no KVM, or it may not be opened, all is unknown. Parsing is pure.

Source: Linux Documentation/virt/kvm/api.rst (4.2, 4.46, 4.56), include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agents.hypervisors.embedded.cpuid import family_model_stepping, features_of_bits
from migrate.cpunames import canonical_all

__all__ = ["KVM_DEVICE", "MAX_ENTRIES", "KvmCpu", "cpu_of_entries", "kvm_cpu"]

KVM_DEVICE: Final = Path("/dev/kvm")
_CREATE_VM: Final = 0xAE01
_CHECK_EXTENSION: Final = 0xAE03
_CREATE_VCPU: Final = 0xAE41
_GET_TSC_KHZ: Final = 0xAEA3
_GET_SUPPORTED_CPUID: Final = 0xC008AE05
_CAP_TSC_CONTROL: Final = 60
# KVM_MAX_CPUID_ENTRIES of Linux 5.10 and newer; before it were 80.
MAX_ENTRIES: Final = 256
_HEADER: Final = struct.Struct("=II")
_ENTRY: Final = struct.Struct("=7I12x")
_REGISTERS: Final = ("eax", "ebx", "ecx", "edx")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmCpu:
    """The host's CPU as KVM gives it. "", 0, () and None: not known."""

    vendor: str = ""
    family: int = 0
    number: int = 0
    stepping: int = 0
    features: tuple[str, ...] = ()
    tsc_khz: int = 0
    has_tsc_scaling: bool | None = None


def kvm_cpu(device: Path = KVM_DEVICE) -> KvmCpu:
    """Ask this host's KVM."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return KvmCpu()
    try:
        answer = bytearray(_HEADER.size + MAX_ENTRIES * _ENTRY.size)
        _HEADER.pack_into(answer, 0, MAX_ENTRIES, 0)
        fcntl.ioctl(fd, _GET_SUPPORTED_CPUID, answer, True)
        vendor, signature, features = cpu_of_entries(bytes(answer))
        family, number, stepping = family_model_stepping(signature)
        return KvmCpu(
            vendor=vendor,
            family=family,
            number=number,
            stepping=stepping,
            features=features,
            tsc_khz=_tsc_khz(fd),
            has_tsc_scaling=fcntl.ioctl(fd, _CHECK_EXTENSION, _CAP_TSC_CONTROL) > 0,
        )
    except (OSError, ValueError):
        return KvmCpu()
    finally:
        os.close(fd)


def cpu_of_entries(answer: bytes) -> tuple[str, int, tuple[str, ...]]:
    """Read the answer to KVM_GET_SUPPORTED_CPUID: the maker, the signature (EAX of leaf 1), the names of the features.

    Raises:
        ValueError: it is shorter than it says, or has more entries than KVM has.
    """
    if len(answer) < _HEADER.size:
        raise ValueError("no header")
    count, _ = _HEADER.unpack_from(answer)
    if count > MAX_ENTRIES or len(answer) < _HEADER.size + count * _ENTRY.size:
        raise ValueError(f"{count} entries in {len(answer)} bytes")
    leaves: dict[tuple[int, int], Mapping[str, int]] = {}
    for number in range(count):
        function, index, _, *values = _ENTRY.unpack_from(answer, _HEADER.size + number * _ENTRY.size)
        leaves[function, index] = dict(zip(_REGISTERS, values, strict=True))
    bits = {
        (function, index, name): value
        for (function, index), registers in leaves.items()
        for name, value in registers.items()
    }
    first = leaves.get((0, 0), {})
    words = struct.pack("=3I", *(first.get(name, 0) for name in ("ebx", "edx", "ecx")))
    vendor = words.rstrip(b"\0").decode("ascii", "replace")
    return vendor, bits.get((1, 0, "eax"), 0), canonical_all(features_of_bits(bits))


def _tsc_khz(fd: int) -> int:
    """A vCPU's counter has the host's rate until somebody sets another."""
    opened: list[int] = []
    try:
        opened.append(fcntl.ioctl(fd, _CREATE_VM, 0))
        opened.append(fcntl.ioctl(opened[0], _CREATE_VCPU, 0))
        return max(fcntl.ioctl(opened[1], _GET_TSC_KHZ, 0), 0)
    except OSError:
        return 0
    finally:
        for one in reversed(opened):
            os.close(one)
