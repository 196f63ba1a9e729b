"""What the kernel's security modules say of a process.

Law: reads files below `root`; decides nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from agents.kernelfiles import text_of
from migrate.facts import Confinement

__all__ = ["ROOT", "confinement_of", "has_apparmor", "has_selinux", "profile_of", "selinux_label_of"]

ROOT: Final = Path("/")
_UNCONFINED: Final = "unconfined"
# A context is a page at most; ours are some dozens of bytes.
_MAX_BYTES: Final = 4096


def has_selinux(root: Path = ROOT) -> bool:
    """Tell whether SELinux is on, in whichever mode."""
    return (root / "sys/fs/selinux/enforce").is_file()


def has_apparmor(root: Path = ROOT) -> bool:
    """Tell whether AppArmor is on."""
    return _line(root / "sys/module/apparmor/parameters/enabled").startswith("Y")


def selinux_label_of(pid: int | str, root: Path = ROOT) -> str:
    """Give the label of a process; empty where SELinux is off, or the process is gone."""
    if not has_selinux(root):
        return ""
    attributes = root / f"proc/{pid}/attr"
    # Where modules are stacked `current` is that of whichever the process has chosen.
    return _line(attributes / "selinux/current") or _line(attributes / "current")


def profile_of(pid: int | str, root: Path = ROOT) -> str:
    """Give the name of the AppArmor profile that confines a process; empty where none does."""
    if not has_apparmor(root):
        return ""
    attributes = root / f"proc/{pid}/attr"
    line = _line(attributes / "apparmor/current")
    if not line and not has_selinux(root):
        line = _line(attributes / "current")
    # "NAME (MODE)"; a name may have blanks and brackets of its own.
    name, _, _ = line.rpartition(" (") if line.endswith(")") else (line, "", "")
    return "" if name == _UNCONFINED else name


def confinement_of(pid: int, root: Path = ROOT) -> Confinement:
    """Give what confines a guest's process."""
    return Confinement(selinux_label=selinux_label_of(pid, root), apparmor_profile=profile_of(pid, root))


def _line(path: Path) -> str:
    return text_of(path, _MAX_BYTES).rstrip("\0\n")
