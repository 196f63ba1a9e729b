"""Network disks: a URL as the words of a -blockdev, and those words as a URL.

Law: pure, and both directions in one place. A URL has one spelling here (`DiskUrl.words`) and its words
have one as well, so that who reads a guest's command line finds the URL that it was written from.

Source: QEMU, qapi/block-core.json (BlockdevOptionsNbd, -Iscsi, -Nfs, -Gluster, -Rbd, -CurlHttp).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Final

from agents.storageproof.urls import (
    GLUSTER,
    ISCSI,
    RBD,
    DiskUrl,
    gluster_words,
    iscsi_words,
    parse,
    rbd_words,
)

__all__ = ["PROTOCOLS", "problem_of", "take_url", "url_of_filename", "words_of"]

# Those whose servers were tried with a guest that moves, or that it only reads.
PROTOCOLS = ("nbd", ISCSI, "nfs", GLUSTER, RBD, "https", "http")
_NBD, _ISCSI, _NFS, _GLUSTER, _RBD, _HTTPS, _HTTP = PROTOCOLS
# QEMU's curl driver cannot write.
_READ_ONLY: Final = (_HTTPS, _HTTP)
# BlockdevOptionsNfs has no port: libnfs asks the server's portmapper, or takes NFS's own.
_NFS_PORT: Final = 2049
# What is beside the words of a place, and makes it the place of something else. More servers of one cluster do not.
_OF_ANOTHER_IMAGE: Final = frozenset({"file.conf", "file.snapshot"})
_TARGET_AND_LUN: Final = re.compile(r"/(?P<target>[^/]+)/(?P<lun>[0-9]{1,5})")
_EXAMPLES: Final = (
    "nbd://store1:10809/web1, iscsi://store1:3260/iqn.2026-01.example:web1/1, nfs://store1:2049/guests/web1, "
    "gluster://store1:24007/guests/web1, rbd://vm@mon1:3300/guests/web1 or https://store1:443/install.iso"
)


def problem_of(text: str, *, is_read_only: bool) -> str | None:
    """Say why a URL cannot be a disk of a guest, or None."""
    url = parse(text)
    if url is None or url.scheme not in PROTOCOLS or url.words != text:
        return f"{text!r:.80} is no URL with a port of {', '.join(PROTOCOLS)}, such as {_EXAMPLES}"
    if url.scheme == _ISCSI and not _TARGET_AND_LUN.fullmatch(url.path):
        return f"{text!r:.200} does not name a target and a LUN, as iscsi://store1:3260/iqn.2026-01.example:web1/1"
    if url.scheme == _NFS and (url.port != _NFS_PORT or url.path.count("/") < 2):
        return f"{text!r:.200} does not name a file of an export at port {_NFS_PORT}, the only one QEMU can be told"
    if url.scheme == _GLUSTER and url.path.count("/") < 2:
        return f"{text!r:.200} does not name a volume and a file, as gluster://store1:24007/guests/web1"
    if url.scheme == _RBD and url.path.count("/") not in (2, 3):
        return f"{text!r:.200} does not name a pool and an image, as rbd://vm@mon1:3300/guests/web1"
    if url.scheme in _READ_ONLY and not is_read_only:
        return f"{text!r:.200} can only be read by QEMU: say read_only = true"
    return None


def words_of(url: DiskUrl) -> dict[str, str]:
    """Give what QEMU's driver for this URL, which has no problem, is told."""
    if url.scheme == _NBD:
        server = {"server.type": "inet", "server.host": url.host, "server.port": str(url.port)}
        return server | {"export": url.path.removeprefix("/")}
    if url.scheme == _ISCSI:
        return iscsi_words(url)
    if url.scheme == _NFS:
        return {"server.type": "inet", "server.host": url.host, "path": url.path}
    if url.scheme == _GLUSTER:
        return gluster_words(url)
    return rbd_words(url) if url.scheme == _RBD else {"url": url.words}


def take_url(protocol: str, fields: dict[str, str]) -> str | None:
    """Take out of a -blockdev's words those that name its place; give the URL, or None if no URL says the same."""
    names = {
        _NBD: ("server.type", "server.host", "server.port", "export"),
        _ISCSI: ("transport", "portal", "target", "lun"),
        _NFS: ("server.type", "server.host", "path"),
        _GLUSTER: ("volume", "path", "server.0.type", "server.0.host", "server.0.port"),
        _RBD: ("pool", "namespace", "image", "user", "server.0.host", "server.0.port"),
    }.get(protocol, ("url",))
    found = {name: fields.pop(f"file.{name}", "") for name in names}
    if protocol == _NBD:
        path = f"/{found['export']}" if found["export"] else ""
        url = parse(f"nbd://{_bracketed(found['server.host'])}:{found['server.port']}{path}")
    elif protocol == _ISCSI:
        url = parse(f"iscsi://{found['portal']}/{found['target']}/{found['lun']}")
    elif protocol == _NFS:
        url = parse(f"nfs://{_bracketed(found['server.host'])}:{_NFS_PORT}{found['path']}")
    elif protocol == _GLUSTER:
        url = parse(f"gluster://{_first_server(found)}/{found['volume']}/{found['path']}")
    elif protocol == _RBD:
        user = f"{found['user']}@" if found["user"] else ""
        path = "".join(f"/{found[name]}" for name in ("pool", "namespace", "image") if found[name])
        url = parse(f"rbd://{user}{_first_server(found)}{path}")
    else:
        url = parse(found["url"])
    if (
        url is None
        or problem_of(url.words, is_read_only=True)
        or dict.fromkeys(names, "") | words_of(url) != found
    ):
        return None
    return url.words


def url_of_filename(name: str) -> str:
    """Give the URL of what QEMU calls an image that it has open; the name as it is, where it is no network disk's.

    QEMU has URLs for most of them, without the usual port, and `json:` with its driver's words for an iSCSI LUN.
    """
    if not name.startswith("json:"):
        place = parse(name)
        return place.words if place and place.scheme in PROTOCOLS else name
    try:
        block = json.loads(name.removeprefix("json:"))
        while isinstance(block, dict) and block.get("driver") not in PROTOCOLS:
            block = block.get("file")
        words = dict(_flat(block, "file.")) if isinstance(block, dict) else {}
    except (ValueError, RecursionError):
        return name
    url = take_url(words.pop("file.driver", ""), words)
    return url if url and not words.keys() & _OF_ANOTHER_IMAGE else name


def _flat(block: dict[str, object], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in block.items():
        if isinstance(value, list):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


def _first_server(words: Mapping[str, str]) -> str:
    return f"{_bracketed(words['server.0.host'])}:{words['server.0.port']}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
