"""A machine with an NFS server and clients: Debian's kernel under QEMU, this very Python, and what a program imports.

Law: nothing of this host is changed: the server needs its own kernel, and this one may have none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from agents.demo.qemu import best_accel
from agents.testguest.image import initramfs
from tests.agents.hypervisors.qemu.conftest import QEMU
from tests.agents.hypervisors.qemu.linux import BUSYBOX, Boot, with_dependencies
from tests.nfs.inside import Fault

__all__ = ["results_of"]

PROGRAM: Final = "tests.nfs.inside"
SERVER: Final = ("exportfs", "rpc.nfsd", "rpc.mountd")
MODULES: Final = ("nfsd", "nfsv4")
RAM: Final = "1024"
# The race, and each fault.
RESULTS: Final = 1 + len(Fault)
ROOT: Final = Path(__file__).resolve().parents[2]
# Legacy paths that nfs-utils insists on are made; nobody asks for locks or for version 3.
_INIT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /tmp /run /var/lib/nfs/v4recovery /srv/export /mnt/a /mnt/b /mnt/c
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
for module in {modules}; do insmod /modules/$module; done
ip link set lo up
mount -t tmpfs tmpfs /srv/export
mount -t nfsd nfsd /proc/fs/nfsd
exportfs -a
rpc.mountd -N 2 -N 3
rpc.nfsd -N 3 4
echo Y > /proc/fs/nfsd/v4_end_grace
common=vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,nosharecache,retrans=1
mount -i -t nfs4 -o $common,hard,timeo=20 127.0.0.1:/ /mnt/a || poweroff -f
mount -i -t nfs4 -o $common,soft,timeo=5 127.0.0.1:/ /mnt/b || poweroff -f
mount -i -t nfs4 -o $common,hard,timeo=5 127.0.0.1:/ /mnt/c || poweroff -f
export PYTHONHOME={home} PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1
{python} -m {program} {every}
poweroff -f
"""
_FILES: Final = {
    "etc/exports": b"/srv/export 127.0.0.1(rw,fsid=0,no_subtree_check,no_root_squash,sync)\n",
    "etc/hosts": b"127.0.0.1 localhost\n",
    "etc/netconfig": b"tcp tpi_cots_ord v inet tcp - -\nudp tpi_clts v inet udp - -\n",
    "etc/passwd": b"root:x:0:0::/:/bin/sh\n",
    "etc/services": b"nfs 2049/tcp\n",
    "etc/protocols": b"tcp 6 TCP\nudp 17 UDP\n",
}
# What Python looks for by name before it imports anything, and what runpy and AnyIO import late.
_LATE: Final = ("os", "runpy", "pkgutil", "anyio._backends._asyncio", "encodings.latin_1", "encodings.ascii")


def results_of(folder: Path, *, every: int, timeout_s: float) -> list[dict[str, object]]:
    """Run the program with one operation in `every`, and give what it found; skips the test where something lacks."""
    boot = Boot.at(folder)
    (folder / "initrd").write_bytes(_archive(every))
    options = [
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "q35",
        "-cpu",
        "max",
        "-no-reboot",
        "-serial",
        "stdio",
        "-m",
    ]
    command = [str(QEMU), *options, RAM, "-accel", str(best_accel())]
    command += ["-kernel", boot.kernel, "-initrd", str(folder / "initrd")]
    command += ["-append", "console=ttyS0 quiet panic=-1"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    found = [json.loads(line) for line in re.findall(r"^RESULT (\{.*\})\r?$", done.stdout, re.MULTILINE)]
    if len(found) < RESULTS:
        raise AssertionError(f"the machine broke off: {done.stdout[-3000:]}{done.stderr[-1000:]}")
    return found


def _archive(every: int) -> bytes:
    tools = [_tool(name) for name in SERVER]
    python, modules = Path(os.path.realpath(sys.executable)), _imported()
    native = [path for path in modules if ".so" in path.name]
    files = dict(_FILES)
    for path in (*tools, python, *modules, *_libraries(*tools, python, *native)):
        files[str(path).lstrip("/")] = path.read_bytes()
    if not BUSYBOX.exists():
        pytest.skip("needs busybox-static")
    drivers = with_dependencies(MODULES)
    files |= {f"modules/{driver.name}": driver.read_bytes() for driver in drivers}
    files["bin/busybox"] = BUSYBOX.read_bytes()
    files["init"] = _INIT.format(
        modules=" ".join(driver.name for driver in drivers),
        home=sys.base_prefix,
        path=":".join([str(ROOT), *(folder for folder in sys.path if folder.endswith("site-packages"))]),
        python=python,
        program=PROGRAM,
        every=every,
    ).encode()
    return initramfs(files)


def _tool(name: str) -> Path:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip("needs nfs-kernel-server")
    return Path(found)


def _imported() -> list[Path]:
    """Give the files of all modules that the program imports."""
    script = f"import sys, {', '.join((PROGRAM, *_LATE))}\n" + (
        "print(*{m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)}, sep='\\n')"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [Path(line) for line in told.stdout.splitlines() if line]


def _libraries(*programs: Path) -> set[Path]:
    """Give the shared libraries that these are linked to, and their loader."""
    found: set[Path] = set()
    for program in programs:
        told = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
        found |= {Path(path) for path in re.findall(r"(/\S+) \(0x", told.stdout)}
    return found
