"""Firmware: what a running QEMU has in its memory, what this host's QEMU would load, and files of the guest's own.

Law: reads, changes nothing. Names and paths may come from a peer: a name is looked up in QEMU's own directories only, a
path is opened below shared directories only. What was read is kept until the file changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents.hypervisors.qemu.qmp import Qmp
from migrate.facts import FileFacts, FirmwareFacts, RomFacts

__all__ = ["MAX_FILES", "MAX_FIRMWARE_BYTES", "MAX_ROMS", "RomShelf", "loaded_images", "memory_bytes"]

# OVMF has 4 MiB, the largest build of it 16.
MAX_FIRMWARE_BYTES: Final = 64 << 20
# A machine loads one image for each kind of card that it has.
MAX_ROMS: Final = 32
# Code and variables.
MAX_FILES: Final = 4
_LIST_TIMEOUT_S: Final = 10.0
_PAGE: Final = 4096
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A block of RAM: its name, and the bytes it uses.
_BLOCK: Final = re.compile(
    r"^\s*(\S+)\s+\d+ [KMG]iB\s+0x[0-9a-f]+\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s", re.MULTILINE
)
_GENERATED: Final = "/rom@genroms/"
# Which file an option ROM is from: QEMU names the block by the device.
_FILES: Final[Mapping[str, str]] = {
    "virtio-net-pci.rom": "efi-virtio.rom",
    "e1000.rom": "efi-e1000.rom",
    "e1000e.rom": "efi-e1000e.rom",
    "rtl8139.rom": "efi-rtl8139.rom",
    "vmxnet3.rom": "efi-vmxnet3.rom",
    "vga.rom": "vgabios-stdvga.bin",
    "virtio-vga.rom": "vgabios-virtio.bin",
    "qxl.rom": "vgabios-qxl.bin",
}


def loaded_images(info_ramblock: str, firmware: str) -> dict[str, int]:
    """Give the size in memory of each image, by its file's name; `firmware` is what the machine's property says."""
    found: dict[str, int] = {}
    for name, size in _BLOCK.findall(info_ramblock):
        if name == "pc.bios":
            file = firmware
        elif name.startswith(_GENERATED):
            file = name.removeprefix(_GENERATED)
        else:
            file = _FILES.get(name.rpartition("/")[2], "")
        if _NAME.fullmatch(file) and len(found) < MAX_ROMS:
            found[file] = int(size, 16)
    return found


def memory_bytes(name: str, file_bytes: int) -> int:
    """Give what an image of that size takes in memory.

    Source: QEMU 7.2, hw/pci/pci.c pci_add_option_rom (a power of two), hw/i386/x86.c x86_bios_rom_init,
        hw/core/loader.c.
    """
    if name.startswith(("efi-", "pxe-", "vgabios")):
        return max(1 << (file_bytes - 1).bit_length(), _PAGE) if file_bytes else 0
    return -(-file_bytes // _PAGE) * _PAGE


class RomShelf:
    """The directories that a QEMU loads its images from, and what was read there."""

    def __init__(self, binary: Path, shared_dirs: Sequence[Path] = ()) -> None:
        self._binary = binary
        self._shared_dirs = shared_dirs
        self._dirs: dict[float, tuple[Path, ...]] = {}
        self._hashes: dict[tuple[str, int, int], str] = {}

    async def of_running(self, qmp: Qmp) -> tuple[RomFacts, ...]:
        """Give what a running QEMU has loaded; a content is known if its file still has the size of it."""
        firmware = await qmp.execute("qom-get", {"path": "/machine", "property": "firmware"})
        loaded = loaded_images(await qmp.human("info ramblock"), str(firmware))
        here = {rom.name: rom for rom in await self.find(loaded)}
        return tuple(
            RomFacts(name=name, size_bytes=size, sha256=here[name].sha256)
            if name in here and here[name].size_bytes == size
            else RomFacts(name=name, size_bytes=size)
            for name, size in sorted(loaded.items())
        )

    async def find(self, names: Iterable[str]) -> tuple[RomFacts, ...]:
        """Give what this host's QEMU would load for these names; what it does not find is left out."""
        wanted = sorted({name for name in names if _NAME.fullmatch(name)})[:MAX_ROMS]
        return await anyio.to_thread.run_sync(self._find, wanted) if wanted else ()

    async def own(self, kind: str, paths: Iterable[tuple[str, str]]) -> FirmwareFacts:
        """Give what lies at the paths of a guest's own firmware; (role, path) each."""
        return await anyio.to_thread.run_sync(self._own, kind[:16], list(paths)[:MAX_FILES])

    def _find(self, names: Sequence[str]) -> tuple[RomFacts, ...]:
        return tuple(rom for name in names if (rom := self._rom(name)) is not None)

    def _rom(self, name: str) -> RomFacts | None:
        for folder in self._folders():
            try:
                size_bytes, sha256 = self._hash(str(folder / name))
            except OSError:
                continue
            return RomFacts(name=name, size_bytes=memory_bytes(name, size_bytes), sha256=sha256)
        return None

    def _folders(self) -> tuple[Path, ...]:
        """Ask the binary where it looks, once for each version of it."""
        try:
            made_s = os.stat(self._binary).st_mtime
            if made_s not in self._dirs:
                said = subprocess.run(
                    [str(self._binary), "-L", "help"],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=False,
                    timeout=_LIST_TIMEOUT_S,
                )
                lines = os.fsdecode(said.stdout).splitlines() if said.returncode == 0 else []
                self._dirs = {made_s: tuple(Path(line) for line in lines if line.startswith("/"))}
        except (OSError, subprocess.SubprocessError):
            return ()
        return self._dirs[made_s]

    def _own(self, kind: str, paths: Sequence[tuple[str, str]]) -> FirmwareFacts:
        return FirmwareFacts(kind=kind, files=tuple(self._file(role[:16], path) for role, path in paths))

    def _file(self, role: str, path: str) -> FileFacts:
        try:
            resolved = os.path.realpath(path)
            folders = [os.path.realpath(folder) for folder in self._shared_dirs]
            if not any(Path(resolved).is_relative_to(folder) for folder in folders):
                return FileFacts(
                    role=role, path=path, error="it is below no directory of [storage] shared_dirs"
                )
            size_bytes, sha256 = self._hash(resolved)
        except (OSError, ValueError) as exc:
            return FileFacts(
                role=role, path=path, is_shared=True, error=getattr(exc, "strerror", "") or str(exc)
            )
        return FileFacts(role=role, path=path, is_shared=True, size_bytes=size_bytes, sha256=sha256)

    def _hash(self, path: str) -> tuple[int, str]:
        """Give size and SHA-256 of a regular file. Raises OSError, ValueError."""
        # Whoever names a FIFO must not make us wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(0, "it is no regular file")
            if facts.st_size > MAX_FIRMWARE_BYTES:
                raise OSError(0, f"it has more than {MAX_FIRMWARE_BYTES >> 20} MiB")
            key = path, facts.st_mtime_ns, facts.st_size
            if key not in self._hashes:
                with os.fdopen(os.dup(fd), "rb") as file:
                    content = file.read(MAX_FIRMWARE_BYTES)
                # One content a path is kept, so that a file that changes fills nothing.
                self._hashes = {known: sha for known, sha in self._hashes.items() if known[0] != path}
                self._hashes[key] = hashlib.sha256(content).hexdigest()
            return facts.st_size, self._hashes[key]
        finally:
            os.close(fd)
