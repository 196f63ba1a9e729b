"""Debian's Linux kernels in /boot, their drivers, and what QEMU and busybox take of them without delay.

Law: reads files and no more; what a test needs and is not there is `NotHere`, which CI does not let pass.
"""

from __future__ import annotations

import atexit
import functools
import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import zstandard

from agents.testguest.image import initramfs
from tests.needs import NotHere, need_file, need_program

__all__ = ["Version", "initramfs_of", "kernel_of", "unpacked"]

_BOOT: Final = Path("/boot")
_ELF: Final = b"\x7fELF"
_XZ: Final = b"\xfd7zXZ\x00"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"

_BUSYBOX: Final = "/bin/busybox"
# Drivers may be for hardware that is not there.
_INIT: Final = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /bin/busybox insmod /modules/$module || echo INSMOD-FAILED $module; done
/bin/busybox --install -s /bin
{script}
"""

Version = tuple[int, int]


def kernel_of(*, since: Version = (0, 0), before: Version = (1000, 0)) -> Path:
    """Give the newest kernel of these versions."""
    found = [
        (version, path)
        for path in _BOOT.glob("vmlinuz-*")
        if since <= (version := _version(path)) < before and path.stat().st_size
    ]
    if not found:
        limits = (
            f"{since[0]}.{since[1]} or newer" if since > (0, 0) else f"older than {before[0]}.{before[1]}"
        )
        raise NotHere(
            f"needs a Linux kernel in /boot, {limits} (Debian: linux-image-amd64, linux-image-6.12-amd64)"
        )
    return max(found)[1]


def _drivers_of(kernel: Path, *names: str) -> dict[str, bytes]:
    """Give these drivers and those that they need, by their files' names, in the order in which they must be loaded."""
    found: dict[str, bytes] = {}
    release = kernel.name.removeprefix("vmlinuz-")
    for name in names:
        shown = subprocess.run(
            [need_program("modprobe"), "-S", release, "--show-depends", name],
            capture_output=True,
            text=True,
            check=True,
        )
        for line in shown.stdout.splitlines():
            if line.startswith("insmod"):
                path = Path(line.split()[1])
                content = path.read_bytes()
                name_here = path.name.removesuffix(".xz")
                found.setdefault(name_here, content if name_here == path.name else lzma.decompress(content))
    return found


def initramfs_of(kernel: Path, script: str, *drivers: str, files: Mapping[str, bytes] | None = None) -> bytes:
    """Give an initramfs whose init loads these drivers and runs a shell script with busybox."""
    loaded = _drivers_of(kernel, *drivers)
    contents = {f"modules/{name}": content for name, content in loaded.items()} | dict(files or {})
    contents["bin/busybox"] = Path(need_file("busybox-static", _BUSYBOX)).read_bytes()
    contents["init"] = _INIT.format(modules=" ".join(loaded), script=script).encode()
    return initramfs(contents)


@functools.cache
def unpacked(kernel: Path) -> Path:
    """The ELF image in a packed kernel: without KVM a guest needs longer to unpack it than to boot."""
    for image in _images(kernel.read_bytes()):
        if image.startswith(_ELF):
            folder = Path(tempfile.mkdtemp(prefix="vmferry-kernel-"))
            atexit.register(shutil.rmtree, folder)
            (folder / "vmlinux").write_bytes(image)
            return folder / "vmlinux"
    return kernel


def _images(packed: bytes) -> Iterator[bytes]:
    """What may be the image: a few bytes that look like the beginning of one are in the code before it, too."""
    for magic, decompressor in (
        (_XZ, lzma.LZMADecompressor),
        (_ZSTD, zstandard.ZstdDecompressor().decompressobj),
    ):
        for begins in re.finditer(re.escape(magic), packed):
            try:
                yield decompressor().decompress(packed[begins.start() :])
            except (lzma.LZMAError, zstandard.ZstdError):
                continue


def _version(kernel: Path) -> Version:
    found = re.match(r"vmlinuz-(\d+)\.(\d+)", kernel.name)
    return (int(found[1]), int(found[2])) if found else (0, 0)
