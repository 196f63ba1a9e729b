"""Real servers of network disks, each for as long as a block lasts: NBD, iSCSI, HTTP, NFS, Gluster and Ceph.

Law: each says itself what it needs of the machine, QEMU's driver of its protocol included, before it starts anything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from agents.storageproof.urls import gluster_words, parse
from tests.agents.host.fleet import free_port
from tests.agents.parted import networks_of
from tests.needs import need_file, need_fuse, need_program, need_root
from tests.waiting import until_blocking

__all__ = [
    "IscsiTarget",
    "gluster_file",
    "http_file",
    "iscsi_lun",
    "iscsi_target",
    "mounted_gluster",
    "nbd_export",
    "nfs_file",
    "rbd_image",
]

TARGET: Final = "iqn.2026-01.example:guest-1"
TGTADM_TIMEOUT_S: Final = 10.0
CEPH_TIMEOUT_S: Final = 30.0


@contextlib.contextmanager
def nbd_export(image: Path, *options: str, export: str = "guest-1", clients: int = 0) -> Iterator[str]:
    """Serve a raw image to so many clients at once (0: any); give the URL."""
    server, port = need_program("qemu-nbd"), free_port()
    words = (server, "-t", "-f", "raw", "-x", export, "-b", "127.0.0.1", "-p", str(port))
    with _running([*words, "-e", str(clients), "--cache=none", *options, str(image)], _listens(port)):
        yield f"nbd://127.0.0.1:{port}/{export}"


@dataclass(frozen=True, slots=True)
class IscsiTarget:
    """A target whose LUN 1 is at `url`."""

    url: str
    socket: str
    tgtadm: str

    def tell(self, mode: str, operation: str, *words: str) -> None:
        """Have tgtadm change it, whoever is logged in."""
        subprocess.run(
            [
                *(self.tgtadm, "--lld", "iscsi", "--tid", "1"),
                *("--mode", mode, "--op", operation, *words),
            ],
            env={**os.environ, "TGT_IPC_SOCKET": self.socket},
            check=True,
            capture_output=True,
            timeout=TGTADM_TIMEOUT_S,
        )


@contextlib.contextmanager
def iscsi_target(image: Path) -> Iterator[IscsiTarget]:
    """Have a target with a raw image as its LUN 1, which anybody may log in to."""
    _need_driver("iscsi")
    port, tgtd = free_port(), need_program("tgtd")
    target = IscsiTarget(f"iscsi://127.0.0.1:{port}/{TARGET}/1", f"{image}.tgtd", need_program("tgtadm"))
    server = [tgtd, "-f", "--iscsi", f"portal=127.0.0.1:{port}"]
    with _running(server, _listens(port), {**os.environ, "TGT_IPC_SOCKET": target.socket}):
        target.tell("target", "new", "-T", TARGET)
        target.tell("logicalunit", "new", "--lun", "1", "-b", str(image))
        target.tell("target", "bind", "-I", "ALL")
        yield target


@contextlib.contextmanager
def iscsi_lun(image: Path) -> Iterator[str]:
    """Have a target with a raw image as its LUN 1; give the URL."""
    with iscsi_target(image) as target:
        yield target.url


@contextlib.contextmanager
def http_file(image: Path) -> Iterator[str]:
    """Serve the folder of an image to readers; give the image's URL."""
    _need_driver("curl")
    nginx, port, conf = need_program("nginx"), free_port(), image.with_name("nginx.conf")
    conf.write_text(
        f"daemon off; pid {conf}.pid; error_log {conf}.log; events {{}}\n"
        + (f"user {user};\n" if (user := _user()) else "")
        + f"http {{ access_log off; server {{ listen 127.0.0.1:{port}; root {image.parent}; }} }}\n"
    )
    with _running([nginx, "-e", f"{conf}.log", "-c", str(conf)], _listens(port)):
        yield f"http://127.0.0.1:{port}/{image.name}"


@contextlib.contextmanager
def nfs_file(image: Path) -> Iterator[str]:
    """Export the folder of an image from a host with an address of its own; give the image's URL.

    The portmapper's port is one for a host, and this machine may have one: so is the directory that it writes to.
    """
    _need_driver("nfs")
    _need_namespaces("ganesha.nfsd", "rpcbind", "rpcinfo")
    conf, log = image.with_name("ganesha.conf"), image.with_name("ganesha.log")
    conf.write_text(
        "NFS_CORE_PARAM { Protocols = 3; Enable_NLM = false; Enable_RQUOTA = false; }\n"
        f"EXPORT {{ Export_Id = 1; Path = {image.parent}; Pseudo = /guests; Access_Type = RW;\n"
        "  Squash = No_Root_Squash; SecType = sys; FSAL { Name = VFS; } }\n"
        "LOG { Default_Log_Level = WARN; }\n"
    )
    serve = (
        "mount -t tmpfs tmpfs /run && mkdir -p /run/ganesha && rpcbind -w && "
        f"exec ganesha.nfsd -F -L {log} -f {conf} -p {conf}.pid"
    )
    with networks_of(1) as networks:
        (address,) = networks.addresses

        def serves() -> bool:
            asked = subprocess.run(["rpcinfo", "-t", address, "nfs", "3"], capture_output=True, check=False)
            return asked.returncode == 0

        namespace = [*networks.prefix(0), "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        with _running([*namespace, "sh", "-c", serve], serves):
            yield f"nfs://{address}:2049{image}"


@contextlib.contextmanager
def gluster_file(image: Path) -> Iterator[str]:
    """Have a Gluster of one host, with an address of its own, and a copy of an image in its volume `guests`.

    Give the image's URL. The daemons write to directories of the machine's, which are their own here.
    """
    _need_driver("gluster")
    _need_namespaces("glusterd", "gluster")
    brick, log, started = (image.with_name(f"gluster-{name}") for name in ("brick", "log", "started"))
    brick.mkdir()
    shutil.copy(image, brick)
    own = ("/run", "/var/lib/glusterd", "/var/log/glusterfs")
    mounts = " && ".join(f"mkdir -p {place} && mount -t tmpfs tmpfs {place}" for place in own)
    with networks_of(1) as networks:
        (address,) = networks.addresses
        serve = (
            f"{mounts} && mkdir /run/gluster || exit 1\n"
            f"glusterd -N -L WARNING -l {log} & server=$!\n"
            f"until gluster --mode=script volume create guests {address}:{brick} force; do sleep 0.1; done\n"
            f"gluster --mode=script volume start guests && touch {started} && wait $server"
        )
        namespace = [*networks.prefix(0), "unshare", "--mount-proc", "--pid", "--fork", "--kill-child"]
        with _running([*namespace, "sh", "-c", serve], started.exists):
            yield f"gluster://{address}:24007/guests/{image.name}"


@contextlib.contextmanager
def mounted_gluster(url: str, place: Path) -> Iterator[tuple[str, str]]:
    """Have the volume of a URL as a file system, through FUSE; give its host and its name."""
    need_fuse("glusterfs")
    far = parse(url)
    assert far is not None
    volume = gluster_words(far)["volume"]
    subprocess.run(["mount", "-t", "glusterfs", f"{far.host}:{volume}", place], check=True)
    try:
        yield far.host, volume
    finally:
        # Whoever has a file of it open is let go, with an error.
        subprocess.run(["umount", "--force", "--lazy", place], check=True)


@contextlib.contextmanager
def rbd_image(image: Path) -> Iterator[str]:
    """Have a Ceph of one monitor and one store in memory, with a copy of a raw image in it; give the URL.

    Its user has a key, where the configuration names it that Ceph's library finds by CEPH_CONF, as it finds
    /etc/ceph/ceph.conf.
    """
    _need_driver("rbd")
    for program in ("ceph-mon", "ceph-osd", "ceph", "rbd"):
        need_program(program)
    folder, port = image.with_name("ceph"), free_port()
    folder.mkdir()
    conf, keys = folder / "server.conf", folder / "server.keyring"
    conf.write_text(
        f"[global]\nfsid = {uuid.uuid4()}\nmon host = [v2:127.0.0.1:{port}]\nkeyring = {keys}\n"
        f"run dir = {folder}\nadmin socket = {folder}/$name.$pid.asok\nlog file = {folder}/$name.log\n"
        f"mon data = {folder}/mon\nosd data = {folder}/osd\n"
        "public addr = 127.0.0.1\nosd objectstore = memstore\nmemstore device bytes = 1073741824\n"
        "osd pool default size = 1\nosd pool default min size = 1\nmon allow pool size one = true\n"
        "osd pool default pg autoscale mode = off\nosd crush chooseleaf type = 0\n"
    )

    def ask(program: str, *words: str) -> str:
        done = subprocess.run(
            [program, "--conf", str(conf), *words],
            capture_output=True,
            text=True,
            timeout=CEPH_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    monmap = str(folder / "monmap")
    ask("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{port}]", monmap)
    everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
    ask("ceph-authtool", str(keys), "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    ask("ceph-authtool", str(keys), "--gen-key", "-n", "client.admin", *everything)
    ask("ceph-authtool", str(keys), "--gen-key", "-n", "osd.0", *everything)
    ask("ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap, "--keyring", str(keys))
    with _running(["ceph-mon", "-f", "--id", "a", "--conf", str(conf)], _listens(port)):
        identity = str(uuid.uuid4())
        number = ask("ceph", "osd", "new", identity, "0").strip()
        (folder / "osd").mkdir()
        ask("ceph-osd", "--mkfs", "--id", number, "--osd-uuid", identity)
        store = ["ceph-osd", "-f", "--id", number, "--conf", str(conf)]
        with _running(store, lambda: "1 up" in ask("ceph", "osd", "stat")):
            ask("ceph", "osd", "pool", "create", "guests", "8")
            ask("rbd", "import", str(image), "guests/guest-1")
            rights = ("mon", "profile rbd", "osd", "profile rbd pool=guests")
            key = ask("ceph", "auth", "get-or-create", "client.vm", *rights)
            (folder / "client.vm.keyring").write_text(key)
            clients = folder / "ceph.conf"
            clients.write_text(f"[client]\nkeyring = {folder}/$name.keyring\n")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CEPH_CONF", str(clients))
                yield f"rbd://vm@127.0.0.1:{port}/guests/guest-1"


@contextlib.contextmanager
def _running(
    command: Sequence[str], serves: Callable[[], bool], environment: dict[str, str] | None = None
) -> Iterator[None]:
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:

        def is_up() -> bool:
            if server.poll() is not None:
                raise AssertionError(f"{command[0]} ended with {server.returncode}")
            return serves()

        try:
            until_blocking(is_up, f"a {command[0]} that serves")
            yield
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(2)
            server.kill()


def _listens(port: int) -> Callable[[], bool]:
    # By its listening socket: a client that connects may be the only one that it takes.
    wanted = f" 0100007F:{port:04X} 00000000:0000 0A "
    return lambda: wanted in Path("/proc/net/tcp").read_text()


def _need_driver(protocol: str) -> None:
    """QEMU's, which is a file of its own."""
    need_file("qemu-block-extra", f"/usr/lib/*/qemu/block-{protocol}.so")


def _need_namespaces(*programs: str) -> None:
    """What servers need that run in a network and mounts of their own, and these programs."""
    need_root()
    for program in ("ip", "unshare", *programs):
        need_program(program)


def _user() -> str:
    """Who reads the files for nginx: root's workers would be of a user that may not enter a test's folder."""
    return "root" if os.geteuid() == 0 else ""
