"""What this host lets a QEMU guest be: its configuration's word, and what is really there.

Law: a spec that came over the wire is judged here, whole, before anything is started from it; each objection says what
to do. Reads the host (files, interfaces, huge pages), changes nothing, decides nothing else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agents.config import QemuSettings
from agents.hypervisors.qemu.spec import Accel, Backend, DiskSpec, Format, NetworkKind, QemuSpec
from agents.storageproof.images import look_at
from agents.storageproof.places import SharedPlaces
from agents.storageproof.urls import is_remote, matches
from migrate.facts import Objection

__all__ = ["QemuHost", "qemu_host"]

_SYS_HUGE: Final = Path("/sys/kernel/mm/hugepages")
_SYS_NET: Final = Path("/sys/class/net")


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuHost:
    """[guests.qemu] of the configuration, and where shared storage is."""

    dir: Path
    binary: Path
    shared_dirs: tuple[Path, ...]
    accels: tuple[Accel, ...]
    shared_devices: tuple[str, ...] = ()
    network_disks: tuple[str, ...] = ()
    kernel_dirs: tuple[Path, ...] = ()
    bridges: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    memory_limit_bytes: int | None = None
    memory_dir: Path = Path("/dev/shm")
    sys_net: Path = field(default=_SYS_NET)
    sys_huge: Path = field(default=_SYS_HUGE)

    def objections(self, spec: QemuSpec, *, has_memory: bool = False) -> Iterator[Objection]:
        """Give everything that speaks against this guest on this host; `has_memory`: its machine is here already."""
        yield from self._accel(spec)
        for disk in spec.disks:
            yield from self._disk(disk)
        for path in (spec.kernel, spec.initrd):
            if path:
                yield from self._file(
                    "kernel", path, self.kernel_dirs, "[guests.qemu] kernel_dirs", writable=False
                )
        yield from self._networks(spec)
        if not has_memory:
            yield from self._pages(spec)

    def _accel(self, spec: QemuSpec) -> Iterator[Objection]:
        if spec.accel not in self.accels:
            yield Objection(
                check="accelerator",
                found=f"{spec.accel} guests are not allowed here",
                remedy="Add it to [guests.qemu] accels",
            )
        elif spec.accel is Accel.KVM and not os.access("/dev/kvm", os.R_OK | os.W_OK):
            yield Objection(
                check="accelerator",
                found="/dev/kvm cannot be opened here",
                remedy="Enable virtualisation in the firmware, load kvm_intel or kvm_amd, and let the agent's user "
                "open it",
            )
        if not os.access(self.binary, os.X_OK):
            yield Objection(
                check="hypervisor-binary",
                found=f"{self.binary} cannot be executed here",
                remedy="Install QEMU, or set [guests.qemu] binary",
            )

    def _disk(self, disk: DiskSpec) -> Iterator[Objection]:
        """A guest writes its own images' headers: what they name is opened by QEMU, and must be allowed as well."""
        writable = not disk.is_read_only
        places = SharedPlaces.of(self.shared_dirs, self.shared_devices, self.network_disks)
        if is_remote(disk.path):
            if not matches(disk.path, self.network_disks):
                yield Objection(
                    check="disk-file",
                    found=f"{disk.path} is none of the network disks that this host allows",
                    remedy="Add it, or a pattern for it, to [storage] network_disks",
                )
                return
        elif places.is_device(disk.path):
            yield from _access("disk", Path(disk.path), disk.path, writable=writable)
        else:
            yield from self._file(
                "disk", disk.path, self.shared_dirs, "[storage] shared_dirs", writable=writable
            )
        if disk.format is not Format.QCOW2:
            return
        seen = look_at(disk.path, places, is_read_only=True)
        for found in (*(one.error for one in seen.chain), seen.chain_error):
            if found:
                yield Objection(
                    check="disk-file",
                    found=f"under {disk.path}: {found}",
                    remedy="Have every image under a disk below [storage] shared_dirs, or merge them (qemu-img rebase)",
                )

    def _file(
        self, what: str, path: str, folders: Sequence[Path], key: str, *, writable: bool
    ) -> Iterator[Objection]:
        resolved = Path(os.path.realpath(path))
        if not any(resolved.is_relative_to(os.path.realpath(folder)) for folder in folders):
            yield Objection(
                check=f"{what}-file",
                found=f"{path} is in none of the directories that this host allows ({key})",
                remedy=f"Move it below one of them, or add its directory to {key}",
            )
            return
        yield from _access(what, resolved, path, writable=writable)

    def _networks(self, spec: QemuSpec) -> Iterator[Objection]:
        for network in spec.networks:
            if network.kind is NetworkKind.USER:
                continue
            allowed, key = (
                (self.bridges, "bridges") if network.kind is NetworkKind.BRIDGE else (self.taps, "taps")
            )
            if network.interface not in allowed:
                yield Objection(
                    check="network-backend",
                    found=f"the {network.kind} {network.interface} is not allowed here",
                    remedy=f"Add it to [guests.qemu] {key}",
                )
            elif not (self.sys_net / network.interface).exists():
                yield Objection(
                    check="network-backend",
                    found=f"there is no {network.kind} {network.interface} here",
                    remedy="Make it, with the same network behind it as on the guest's host",
                )
            elif (
                network.kind is NetworkKind.BRIDGE
                and not (self.sys_net / network.interface / "bridge").exists()
            ):
                yield Objection(
                    check="network-backend",
                    found=f"{network.interface} is no bridge here",
                    remedy="Name a bridge",
                )

    def _pages(self, spec: QemuSpec) -> Iterator[Objection]:
        wanted: dict[int, int] = {}
        for memory in spec.memories:
            if memory.page_bytes:
                wanted[memory.page_bytes] = (
                    wanted.get(memory.page_bytes, 0) + memory.size_bytes // memory.page_bytes
                )
            elif memory.backend is Backend.FILE and not os.access(self.memory_dir, os.W_OK):
                yield Objection(
                    check="memory-dir",
                    found=f"{self.memory_dir} cannot be written, where file-backed RAM lives",
                    remedy="Set [guests.qemu] memory_dir to a tmpfs",
                )
        for page_bytes, pages in wanted.items():
            free = self._free_pages(page_bytes)
            if pages > free:
                yield Objection(
                    check="hugepages",
                    found=f"{pages} huge pages of {page_bytes >> 20} MiB are needed, and {free} are free here",
                    remedy=f"Reserve more: /sys/kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB/nr_hugepages",
                )

    def _free_pages(self, page_bytes: int) -> int:
        folder = self.sys_huge / f"hugepages-{page_bytes >> 10}kB"
        try:
            free = int((folder / "free_hugepages").read_text())
            return free - int((folder / "resv_hugepages").read_text())
        except (OSError, ValueError):
            return 0


def _access(what: str, resolved: Path, path: str, *, writable: bool) -> Iterator[Objection]:
    try:
        facts = os.stat(resolved)
    except OSError as exc:
        yield Objection(
            check=f"{what}-file",
            found=f"{path}: {exc.strerror}",
            remedy="Mount the same storage on this host",
        )
        return
    if not stat.S_ISREG(facts.st_mode) and not stat.S_ISBLK(facts.st_mode):
        yield Objection(check=f"{what}-file", found=f"{path} is no file and no block device", remedy="")
    elif not os.access(resolved, os.R_OK | (os.W_OK if writable else 0)):
        yield Objection(
            check=f"{what}-file",
            found=f"{path} cannot be {'written' if writable else 'read'} by the agent's user",
            remedy="Change its owner or mode, or run the agent as its owner",
        )


def qemu_host(
    settings: QemuSettings,
    shared_dirs: tuple[Path, ...],
    shared_devices: tuple[str, ...] = (),
    network_disks: tuple[str, ...] = (),
) -> QemuHost:
    """Give what the configuration says."""
    return QemuHost(
        dir=settings.dir,
        binary=settings.binary,
        shared_dirs=shared_dirs,
        shared_devices=shared_devices,
        network_disks=network_disks,
        kernel_dirs=settings.kernel_dirs,
        bridges=settings.bridges,
        taps=settings.taps,
        memory_limit_bytes=settings.memory_limit_bytes,
        memory_dir=settings.memory_dir,
        accels=settings.accels,
    )
