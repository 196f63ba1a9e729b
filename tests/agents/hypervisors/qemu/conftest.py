"""Specs, and real QEMU processes that run Linux. Each of those takes some seconds to boot: `slow`."""

from __future__ import annotations

import shutil
import sys
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


def retold_qemu(folder: Path, pattern: str, instead: str) -> Path:
    """Make a QEMU whose answers about itself are others: what matches is replaced. Guests get the real one."""
    told = f"import re\n\n\ndef told(line):\n    return re.sub({pattern.encode()!r}, {instead.encode()!r}, line)\n"
    return write_between(wrapped_qemu(folder, ""), told)


def write_between(binary: Path, told: str) -> Path:
    """Write a QEMU whose lines, where an agent asks what there is, go through the function `told` of this program."""
    binary.write_text(f"#!{sys.executable}\nQEMU = {str(QEMU)!r}\n{told}\n\n{_BETWEEN}")
    binary.chmod(0o755)
    return binary


# Stands between the agent and the QEMU that it asks for its models, and passes lines on.
_BETWEEN = """\
import ctypes, os, socket, subprocess, sys, threading, time

arguments = sys.argv[1:]
asked = [one for one in arguments if one.startswith("unix:")]
if not any(one.startswith("none,accel") for one in arguments) or not asked:
    os.execv(QEMU, ["qemu-system-x86_64", *arguments])
path = asked[0].removeprefix("unix:").partition(",")[0]
inner = path + ".inner"
arguments[arguments.index(asked[0])] = asked[0].replace(path, inner)
# It ends with this process, whoever ends that.
qemu = subprocess.Popen([QEMU, *arguments], preexec_fn=lambda: ctypes.CDLL(None).prctl(1, 9))
there = socket.socket(socket.AF_UNIX)
while there.connect_ex(inner):
    time.sleep(0.01)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
# As on a machine that is busy: the socket is there, and nobody listens yet.
time.sleep(0.1)
listener.listen()
here, _ = listener.accept()


def back():
    for line in there.makefile("rb"):
        here.sendall(told(line))


threading.Thread(target=back, daemon=True).start()
try:
    while data := here.recv(65536):
        there.sendall(data)
finally:
    qemu.kill()
"""


def needs_root_tool(name: str) -> pytest.MarkDecorator:
    """Skip where a tool is missing: CI installs it."""
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"needs {name}")
