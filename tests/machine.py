"""A machine with this host's files under another kernel: what this one's kernel lacks is tried there, for real.

A kernel of Debian's boots in QEMU and mounts this host's root through 9p: a script there finds this Python, this
repository and all programs where they are here. Without KVM on this host the machine has it all the same: QEMU
emulates the processor's virtualisation (AMD's), and the kernel's own KVM works with it.

Law: nothing of this host is changed: what the script writes is in the machine's memory.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agents.demo.qemu import best_accel
from tests.linuxkernels import initramfs_of, unpacked
from tests.needs import need_program

__all__ = ["ROOT", "Outcome", "run_in_machine"]

ROOT: Final = Path(__file__).resolve().parents[1]
# 9p with its transport, and what lets its files seem to be written.
_DRIVERS: Final = ("virtio_pci", "virtio_rng", "9pnet_virtio", "9p", "overlay")
_INIT: Final = """
mkdir -p /host /written /root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host
mount -t tmpfs -o size=50% tmpfs /written
mkdir /written/upper /written/work
mount -t overlay -o lowerdir=/host,upperdir=/written/upper,workdir=/written/work overlay /root
for place in proc sys dev; do mount --move /$place /root/$place; done
for place in run dev/shm; do mkdir -p /root/$place; mount -t tmpfs tmpfs /root/$place; done
ip link set lo up
cp /script /root/run/script
chroot /root /bin/sh -c 'cd {root} && PATH="$PATH:/usr/sbin:/sbin" exec /bin/sh /run/script'
echo "{ended} $?"
poweroff -f
"""
_ENDED: Final = "the script has ended with"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a script printed, to both of its outputs, and its exit code."""

    printed: str
    code: int


def run_in_machine(
    script: str, kernel: Path, folder: Path, *, drivers: tuple[str, ...] = (), ram_mib: int, within_s: float
) -> Outcome:
    """Run a shell script as root in the repository, under that kernel.

    Args:
        folder: gets the machine's initramfs.
        drivers: that the kernel must have loaded; they may be for hardware that is not there.

    Raises:
        NotHere: a tool is missing.
        AssertionError: the machine broke off, or the script did not end in time.
    """
    qemu = need_program("qemu-system-x86_64")
    init = _INIT.format(root=ROOT, ended=_ENDED)
    initrd = folder / "machine.initrd"
    initrd.write_bytes(initramfs_of(kernel, init, *_DRIVERS, *drivers, files={"script": script.encode()}))
    command = [
        *(qemu, "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
        # One CPU: TCG of QEMU 7.2 with more trips over the instructions that KVM of Linux 6.12 replaces in itself.
        *("-machine", "q35", "-accel", str(best_accel()), "-cpu", "max", "-m", str(ram_mib)),
        *("-kernel", str(unpacked(kernel)), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
        *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host", "-device", "virtio-rng-pci"),
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired as exc:
        printed = (exc.stdout or b"").decode(errors="replace")
        raise AssertionError(f"not ended within {within_s:g} s: {printed[-3000:]}") from exc
    printed = done.stdout.decode(errors="replace").replace("\r\n", "\n")
    said, ended, code = printed.rpartition(_ENDED)
    if not ended:
        raise AssertionError(f"the machine broke off: {printed[-3000:]}{done.stderr.decode()[-1000:]}")
    return Outcome(said, int(code.split()[0]))
