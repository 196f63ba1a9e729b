"""A real libvirtd of its own: a session of an ordinary user, with no state of this machine's."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.waiting import until_blocking

__all__ = ["LIBVIRTD", "make_pool", "refresh", "running_libvirt"]

LIBVIRTD: Final = shutil.which("libvirtd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
# The daemon of root would be the machine's own.
NOBODY: Final = 65534
STARTS_WITHIN_S: Final = 20.0


@contextmanager
def running_libvirt(folder: Path) -> Iterator[str]:
    """Give the address of one that serves; it ends with the block. Its user may enter `folder` from then on."""
    own = folder / "libvirt"
    places = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "conf", "XDG_CACHE_HOME": "cache"}
    environment = {"PATH": os.environ["PATH"], "XDG_DATA_HOME": str(own / "data")}
    environment |= {name: str(own / place) for name, place in places.items()}
    for place in (*places.values(), "data"):
        (own / place).mkdir(parents=True)
    conf = own / "libvirtd.conf"
    conf.write_text('host_uuid = "aaaaaaaa-1111-4111-8111-00000000000a"\n')
    user = None
    if os.geteuid() == 0:
        folder.chmod(folder.stat().st_mode | 0o11)
        for path in (own, *own.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        user = NOBODY
    with (own / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [str(LIBVIRTD), "-f", str(conf)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    socket = own / "run/libvirt/libvirt-sock"
    uri = f"qemu+unix:///session?socket={socket}"
    try:
        until_blocking(
            socket.exists, lambda: f"libvirtd: {(own / 'log').read_text()}", within_s=STARTS_WITHIN_S
        )
        yield uri
    finally:
        daemon.terminate()
        daemon.wait(20)


def make_pool(uri: str, kind: str, target: Path, device: str = "") -> None:
    """Make a pool of the volumes that are there now; of kind `fs` it is of the device that is mounted there."""
    source = ("--source-dev", device) if device else ()
    virsh(uri, "pool-create-as", target.name, kind, *source, "--target", str(target))


def refresh(uri: str, target: Path) -> None:
    """Have it look at a pool's volumes again."""
    virsh(uri, "pool-refresh", target.name)


def virsh(uri: str, *words: str) -> None:
    subprocess.run(
        ["virsh", "--quiet", "--connect", uri, *words], check=True, capture_output=True, timeout=30
    )
