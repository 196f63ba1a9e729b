"""A real libvirtd of its own: a session of an ordinary user, with no state of this machine's."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agents.storageproof.urls import ISCSI, RBD, parse
from tests.waiting import until_blocking

__all__ = ["LIBVIRTD", "make_pool", "make_pool_of_url", "refresh", "running_libvirt"]

LIBVIRTD: Final = shutil.which("libvirtd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
# The daemon of root would be the machine's own.
NOBODY: Final = 65534
STARTS_WITHIN_S: Final = 20.0
SECRET: Final = "bbbbbbbb-1111-4111-8111-00000000000b"


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


def make_pool(uri: str, kind: str, target: Path, *source: str) -> None:
    """Make a pool of the volumes that are there now.

    Of kind `fs` its source is the device that is mounted there; of kind `netfs` a host, a directory and a format.
    """
    names = ("--source-dev",) if kind == "fs" else ("--source-host", "--source-path", "--source-format")
    words = [word for pair in zip(names, source, strict=False) for word in pair]
    virsh(uri, "pool-create-as", target.name, kind, *words, "--target", str(target))


def make_pool_of_url(uri: str, url: str, folder: Path) -> str:
    """Make a pool in which a network disk is a volume; give its type. `folder` has a place for files meanwhile."""
    place = parse(url)
    assert place is not None
    source, kind = f"<host name='{place.host}' port='{place.port}'/>", place.scheme
    first = place.path.split("/")[1]
    if kind == ISCSI:
        kind = "iscsi-direct"
        source += f"<device path='{first}'/><initiator><iqn name='iqn.2026-01.example:host'/></initiator>"
    elif kind == RBD:
        source += (
            f"<name>{first}</name><auth type='ceph' username='{place.user}'><secret uuid='{SECRET}'/></auth>"
        )
        _make_secret(uri, place.user, folder)
    else:
        source = f"<host name='{place.host}'/><name>{first}</name>"
    described = folder / "pool.xml"
    described.write_text(f"<pool type='{kind}'><name>far</name><source>{source}</source></pool>")
    virsh(uri, "pool-create", str(described))
    return kind


def _make_secret(uri: str, user: str, folder: Path) -> None:
    """Have the key of a user of Ceph that Ceph's own configuration leads to."""
    keys = Path(os.environ["CEPH_CONF"]).with_name(f"client.{user}.keyring").read_text()
    described, key = folder / "secret.xml", folder / "key"
    described.write_text(
        f"<secret ephemeral='yes'><uuid>{SECRET}</uuid><usage type='ceph'><name>{user}</name></usage></secret>"
    )
    key.write_text(keys.partition("key = ")[2].split()[0])
    virsh(uri, "secret-define", str(described))
    virsh(uri, "secret-set-value", SECRET, "--file", str(key))


def refresh(uri: str, target: Path) -> None:
    """Have it look at a pool's volumes again."""
    virsh(uri, "pool-refresh", target.name)


def virsh(uri: str, *words: str) -> None:
    command = ["virsh", "--quiet", "--connect", uri, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
