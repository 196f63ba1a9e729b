"""Which disks this host may have: below its shared directories, its shared block devices, and URLs of others.

Law: a path is hostile until it went through here. Links are resolved, but for the last part of a device's path: udev
makes /dev/mapper/NAME and /dev/disk/by-id/NAME links, in directories that only root can write.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SharedPlaces"]


@dataclass(frozen=True, slots=True)
class SharedPlaces:
    """[storage] of the configuration: `roots` are shared_dirs with links resolved, `devices` are shared_devices, `urls`
    are network_disks, `libvirt` says whom to ask for storage pools, empty for nobody."""

    roots: tuple[Path, ...]
    devices: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    libvirt: str = ""

    @classmethod
    def of(
        cls,
        shared_dirs: Sequence[Path],
        shared_devices: Sequence[str] = (),
        network_disks: Sequence[str] = (),
        libvirt: str = "",
    ) -> SharedPlaces:
        """Resolve the directories of a configuration."""
        roots = tuple(Path(os.path.realpath(folder)) for folder in shared_dirs)
        return cls(roots, tuple(shared_devices), tuple(network_disks), libvirt)

    def locate(self, path: str) -> Path:
        """Give where a disk's path leads; it may lead to a device that is allowed nowhere else. Blocks.

        Raises:
            OSError: it cannot be looked at, is no absolute path, or is not allowed; `strerror` says which.
        """
        if not path.startswith("/") or "\0" in path:
            raise OSError(0, f"{path!r:.200} is no absolute path")
        resolved = Path(os.path.realpath(path, strict=True))
        if any(resolved.is_relative_to(root) for root in self.roots):
            return resolved
        if self.is_device(path):
            return resolved
        raise OSError(
            0,
            f"{path} is in none of this host's shared directories and is none of its shared devices "
            "([storage] shared_dirs, shared_devices)",
        )

    def is_device(self, path: str) -> bool:
        """Say whether it is a block device, allowed by the name it was called: no link but the last part, no `..`."""
        try:
            is_block = "\0" not in path and stat.S_ISBLK(os.stat(path).st_mode)
        except OSError:
            return False
        if not is_block:
            return False
        parts = Path(path).parts
        if os.path.normpath(path) != path or os.path.realpath(os.path.dirname(path)) != os.path.dirname(path):
            return False
        return any(_matches(parts, Path(pattern).parts) for pattern in self.devices)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """A `*` stands for what is between two slashes, and for no slash."""
    return len(parts) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))
