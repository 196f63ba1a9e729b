"""Linux guests of tests: a kernel, an initramfs with busybox and drivers, and a console to read.

Law: what a test needs of Debian's kernel and busybox is asked for here, and skipped where it is missing; CI installs
all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from agents.testguest.image import Heartbeat, KernelMissing, find_kernel, heartbeats, initramfs
from tests.linuxkernels import initramfs_of, unpacked
from tests.needs import skipped_where_not_here
from tests.waiting import until_blocking

T = TypeVar("T")

# A guest under TCG on a busy machine.
BOOT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Boot:
    """A folder with a kernel and initramfs files."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Boot:
        """Put a kernel there, or skip the test."""
        folder.mkdir(exist_ok=True)
        try:
            kernel = find_kernel()
        except KernelMissing as exc:
            pytest.skip(f"needs a kernel: {exc}")
        if not (folder / "vmlinuz").exists():
            shutil.copy(unpacked(kernel), folder / "vmlinuz")
        return cls(folder)

    @property
    def kernel(self) -> str:
        return str(self.folder / "vmlinuz")

    def initrd(self) -> str:
        """An initramfs whose init is the workload."""
        path = self.folder / "initrd"
        if not path.exists():
            path.write_bytes(initramfs())
        return str(path)

    def initrd_with(self, script: str, *modules: str) -> str:
        """An initramfs whose init loads drivers and runs a shell script; `/bin/workload` is there too."""
        path = self.folder / f"initrd-{abs(hash(script)):x}"
        with skipped_where_not_here():
            path.write_bytes(initramfs_of(find_kernel(), script, *modules))
        return str(path)


@dataclass(frozen=True, slots=True)
class Console:
    """What a guest has printed, by the log that its QEMU writes."""

    log: Path

    def read(self) -> bytes:
        return self.log.read_bytes() if self.log.exists() else b""

    def beats(self) -> list[Heartbeat]:
        return heartbeats(self.read())

    def wait_beats(self, more: int = 1) -> list[Heartbeat]:
        """Wait for some more heartbeats; blocks."""
        wanted = len(self.beats()) + more
        return self._wait(
            lambda: beats if len(beats := self.beats()) >= wanted else None, f"{more} heartbeats"
        )

    def wait_for(self, words: bytes, times: int = 1) -> bytes:
        """Wait until these words were printed so often; blocks."""
        return self._wait(lambda: text if (text := self.read()).count(words) >= times else None, repr(words))

    def _wait(self, look: Callable[[], T | None], what: str) -> T:
        return until_blocking(
            look, lambda: f"{what}: {self.read()[-2000:]!r}", within_s=BOOT_TIMEOUT_S, every_s=0.05
        )
