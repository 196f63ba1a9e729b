"""Which type of storage pool has a disk, as this host's libvirt knows it: asked with virsh, which changes nothing.

Law: the connection is read-only; each virsh (`tools`) is handed a volume as one argument, and of what it says
MAX_SAID_BYTES are read. What libvirt has not seen since a pool was last refreshed is in no pool. Blocks.

Source: libvirt, virsh(1) (vol-pool, pool-dumpxml) and https://libvirt.org/formatstorage.html.
"""

from __future__ import annotations

import re
from typing import Final

from agents.storageproof import tools
from agents.storageproof.urls import DEFAULT_PORTS, GLUSTER, ISCSI, RBD, iscsi_words, parse

__all__ = ["MAX_SAID_BYTES", "is_uri", "pool_of", "volume_of"]

# A pool's description has a kilobyte.
MAX_SAID_BYTES: Final = 1 << 16
# virsh(1), in English.
_NOT_A_VOLUME: Final = "Storage volume not found"
_URI: Final = re.compile(r"[a-z][a-z0-9]*(\+[a-z0-9]+)?://[!-~]*")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TYPE: Final = re.compile(r"<pool type='([a-z][a-z-]{0,31})'>")


def is_uri(text: str) -> bool:
    """Tell whether this could be libvirt's address of a host: `qemu:///system`, say."""
    return _URI.fullmatch(text) is not None


def volume_of(path: str) -> str:
    """Give the key by which libvirt would know the volume at a path or a URL; empty where no type of pool has any.

    Source: libvirt, src/storage/storage_backend_gluster.c, _rbd.c and _iscsi_direct.c.
    """
    if path.startswith("/"):
        return path
    url = parse(path)
    if url is None:
        return ""
    if url.scheme == GLUSTER:
        # The pools of libvirt have a port of 0 for the usual one.
        return url.words.replace(f":{DEFAULT_PORTS[GLUSTER]}/", "/", 1)
    if url.scheme == RBD:
        return url.path.removeprefix("/")
    if url.scheme == ISCSI:
        words = iscsi_words(url)
        return f"ip-{words['portal']}-iscsi-{words['target']}-lun-{words['lun']}"
    return ""


def pool_of(path: str, uri: str) -> str:
    """Give the type of the pool that has a volume at this path or URL, as libvirt spells it; empty when none has.

    Raises:
        OSError: it could not be asked; `strerror` is a sentence.
    """
    volume = volume_of(path)
    if not volume:
        return ""
    try:
        uuid = _run(uri, "vol-pool", "--uuid", f"--vol={volume}").strip()
    except _NotAVolumeError:
        return ""
    if not _UUID.fullmatch(uuid):
        raise OSError(0, "virsh did not say which pool has the volume")
    found = _TYPE.match(_run(uri, "pool-dumpxml", uuid))
    if found is None:
        raise OSError(0, f"virsh did not say of which type the pool {uuid} is")
    return found[1]


class _NotAVolumeError(Exception):
    """No pool has it."""


def _run(uri: str, *words: str) -> str:
    command = ("virsh", "--quiet", "--readonly", "--connect", uri, *words)
    silent = f"libvirt at {uri} did not answer within {tools.ANSWERS_WITHIN_S:g} s"
    done = tools.run(*command, silent=silent)
    if done.returncode == 0:
        return done.stdout[:MAX_SAID_BYTES].decode("utf-8", "replace")
    said = done.stderr[-1000:].decode("utf-8", "replace")
    if _NOT_A_VOLUME in said:
        raise _NotAVolumeError
    reasons = [line.removeprefix("error: ").strip() for line in said.splitlines() if line.strip()]
    raise OSError(0, f"libvirt at {uri}: {reasons[-1][:200] if reasons else 'no reason given'}")
