"""URLs of disks: what is one, and which of them a configuration lets a guest have. Pure.

Law: a URL of a peer is hostile. Its grammar has no options, no spaces, no commas and no way up, so that it is one word
to QEMU and to its tools, and names nothing of this host. A `*` of a pattern stands for letters, digits, `.`, `_` and
`-` alone.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "DEFAULT_PORTS",
    "GLUSTER",
    "ISCSI",
    "MAX_URL_BYTES",
    "RBD",
    "SCHEMES",
    "DiskUrl",
    "as_file",
    "gluster_words",
    "is_remote",
    "iscsi_words",
    "matches",
    "parse",
    "problem_of_pattern",
    "rbd_words",
]

GLUSTER: Final = "gluster"
ISCSI: Final = "iscsi"
RBD: Final = "rbd"

# QEMU's protocols that lead to another host, and whose URLs cannot name a file of this one; with their usual ports.
# QEMU itself has no URL of an image in Ceph.
DEFAULT_PORTS: Final = {
    "nbd": 10809,
    ISCSI: 3260,
    GLUSTER: 24007,
    "nfs": 2049,
    "ssh": 22,
    RBD: 3300,
    "https": 443,
    "http": 80,
}
SCHEMES: Final = tuple(DEFAULT_PORTS)
_HOST: Final = r"(?:[A-Za-z0-9._-]+|\[[0-9a-f:]+\])"
_URL: Final = re.compile(
    rf"(?P<scheme>{'|'.join(SCHEMES)})://(?:(?P<user>[A-Za-z0-9._-]+)@)?(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?"
    r"(?P<path>(?:/[A-Za-z0-9._:-]+)*)"
)
# A star stands for nothing of these; split so, a hostile URL costs no more than its length.
_WORDS: Final = re.compile(r"([/:@\[\]])")
MAX_URL_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class DiskUrl:
    """A URL taken apart. An IPv6 address stands without its brackets; `path` begins with a slash, or is empty.

    `user` is Ceph's alone, whose key both hosts have: another user's disk is another disk. Other servers' are left out.
    """

    scheme: str
    host: str
    port: int
    path: str
    user: str = ""

    @property
    def authority(self) -> str:
        """The host and the port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def words(self) -> str:
        """The one spelling with a port, and with a user for Ceph alone."""
        user = f"{self.user}@" if self.user else ""
        return f"{self.scheme}://{user}{self.authority}{self.path}"


def is_remote(path: str) -> bool:
    """Say whether a disk's path is a URL, or something like one."""
    return "://" in path


def matches(url: str, patterns: Sequence[str]) -> bool:
    """Say whether one of the patterns fits all of a URL."""
    words = _WORDS.split(url)
    return parse(url) is not None and any(_fits(words, _WORDS.split(one)) for one in patterns)


def problem_of_pattern(pattern: str) -> str | None:
    """Say what is wrong with a pattern, or None."""
    if parse(pattern.replace("*", "1")) is not None:
        return None
    return f"{pattern!r:.200} is no URL of {', '.join(SCHEMES)} without options, such as nbd://store1:10809/guest-*"


def _fits(words: list[str], pattern: list[str]) -> bool:
    return len(words) == len(pattern) and all(map(fnmatch.fnmatchcase, words, pattern))


def parse(url: str) -> DiskUrl | None:
    """Take a URL apart; None for every other word."""
    found = _URL.fullmatch(url) if len(url) <= MAX_URL_BYTES else None
    if found is None or ".." in found["path"].split("/"):
        return None
    port = int(found["port"] or DEFAULT_PORTS[found["scheme"]])
    if not 0 < port < 1 << 16:
        return None
    user = (found["user"] or "") if found["scheme"] == RBD else ""
    return DiskUrl(found["scheme"], found["host"].strip("[]"), port, found["path"], user)


def as_file(words: Mapping[str, str]) -> str:
    """Give what a driver of QEMU is told as options of a node whose `file` it is."""
    return ",".join(f"file.{name}={word}" for name, word in words.items())


def iscsi_words(url: DiskUrl) -> dict[str, str]:
    """Give what QEMU's driver is told of a LUN: /TARGET/LUN. Source: BlockdevOptionsIscsi."""
    target, _, lun = url.path.removeprefix("/").rpartition("/")
    return {"transport": "tcp", "portal": url.authority, "target": target, "lun": lun}


def gluster_words(url: DiskUrl) -> dict[str, str]:
    """Give what QEMU's driver is told of a file in Gluster: /VOLUME/FILE. Source: BlockdevOptionsGluster."""
    volume, _, path = url.path.removeprefix("/").partition("/")
    server = {"server.0.type": "inet", "server.0.host": url.host, "server.0.port": str(url.port)}
    return {"volume": volume, "path": path} | server


def rbd_words(url: DiskUrl) -> dict[str, str]:
    """Give what QEMU's driver is told of an image in Ceph: /POOL/IMAGE or /POOL/NAMESPACE/IMAGE.

    Source: QEMU, qapi/block-core.json (BlockdevOptionsRbd).
    """
    pool, _, rest = url.path.removeprefix("/").partition("/")
    namespace, _, image = rest.rpartition("/")
    words = {"pool": pool, "namespace": namespace, "image": image, "user": url.user}
    words |= {"server.0.host": url.host, "server.0.port": str(url.port)}
    return {name: word for name, word in words.items() if word}
