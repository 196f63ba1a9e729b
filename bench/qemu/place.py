"""The directories of a run: what both hosts find there before any guest is started."""

from __future__ import annotations

import shutil
from pathlib import Path

from agents.testguest.image import initramfs
from bench.qemu.certificates import make_certificates
from bench.qemu.source import Place

__all__ = ["furnish"]


def furnish(place: Place, kernel: Path) -> None:
    """Make the directories, the kernel and initramfs, and QEMU's certificates."""
    for name in ("boot", "shared", "host-a/qemu", "host-b/qemu"):
        (place.folder / name).mkdir(parents=True, mode=0o700)
    shutil.copy(kernel, place.boot / "vmlinuz")
    (place.boot / "initrd").write_bytes(initramfs())
    make_certificates(place.folder / "qemu-pki")
