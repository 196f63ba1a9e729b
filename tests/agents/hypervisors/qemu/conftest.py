"""Specs, and real QEMU processes that run Linux. Each of those takes some seconds to boot: `slow`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agents.hypervisors.qemu.spec import (
    Accel,
    Bus,
    Cache,
    DiskSpec,
    Format,
    MemorySpec,
    NetworkKind,
    NetworkSpec,
    QemuSpec,
    Vga,
)

GUEST_ID = "3f0f4c6e-8f0b-4f57-9d0d-5a3c7c1b2a10"
QEMU = Path("/usr/bin/qemu-system-x86_64")

PLAIN = QemuSpec(
    guest_id=GUEST_ID,
    name="web1",
    machine="pc-q35-7.2",
    accel=Accel.TCG,
    cpu="Nehalem",
    vcpus=1,
    memories=(MemorySpec(name="ram0", size_bytes=256 << 20),),
)
RICH = QemuSpec(
    guest_id=GUEST_ID,
    name="web1",
    machine="pc-q35-7.2",
    accel=Accel.KVM,
    cpu="Skylake-Server,+pcid,-hle",
    vcpus=4,
    memories=(
        MemorySpec(name="ram0", size_bytes=256 << 20, node=0),
        MemorySpec(name="ram1", size_bytes=512 << 20, node=1, page_bytes=2 << 20),
    ),
    disks=(
        DiskSpec(path="/srv/a.qcow2", format=Format.QCOW2),
        DiskSpec(path="/srv/b.raw", format=Format.RAW, bus=Bus.SCSI, cache=Cache.DIRECTSYNC),
        DiskSpec(path="/srv/c.raw", format=Format.RAW, cache=Cache.WRITEBACK, is_read_only=True),
    ),
    networks=(
        NetworkSpec(kind=NetworkKind.BRIDGE, mac="52:54:00:00:00:01", interface="br0"),
        NetworkSpec(kind=NetworkKind.TAP, mac="52:54:00:00:00:02", interface="tap0"),
        NetworkSpec(kind=NetworkKind.USER, mac="52:54:00:00:00:03"),
    ),
    kernel="/boot/vmlinuz",
    initrd="/boot/initrd",
    append="console=ttyS0 quiet",
    vga=Vga.STD,
    has_balloon=True,
    has_rng=True,
)


def needs_qemu() -> pytest.MarkDecorator:
    """Skip where there is no QEMU: CI installs one."""
    return pytest.mark.skipif(not QEMU.exists(), reason="needs qemu-system-x86_64 (Debian: qemu-system-x86)")


def wrapped_qemu(folder: Path, arguments: str) -> Path:
    """Make a QEMU of another host: one that is started with these arguments beside its own."""
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / "qemu-wrapped"
    binary.write_text(f'#!/bin/sh\nexec {QEMU} "$@" {arguments}\n')
    binary.chmod(0o755)
    return binary


def needs_root_tool(name: str) -> pytest.MarkDecorator:
    """Skip where a tool is missing: CI installs it."""
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"needs {name}")
