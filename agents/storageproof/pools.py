"""Which type of storage pool has a path, as this host's libvirt knows it: asked with virsh, which changes nothing.

Law: the connection is read-only; each virsh is a process of its own that has ANSWERS_WITHIN_S, is handed a path as one
argument, and may say MAX_SAID_BYTES. What libvirt has not seen since a pool was last refreshed is in no pool. Blocks.

Source: libvirt, virsh(1) (vol-pool, pool-dumpxml) and https://libvirt.org/formatstorage.html.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import Final

__all__ = ["ANSWERS_WITHIN_S", "is_uri", "pool_of"]

# Less than the storage's own bound (`agents.ownership.threads`) for both of them: the reason is known then.
ANSWERS_WITHIN_S: Final = 2.0
# A pool's description has a kilobyte.
MAX_SAID_BYTES: Final = 1 << 16
# virsh(1), with LC_ALL=C.
_NOT_A_VOLUME: Final = "Storage volume not found"
_URI: Final = re.compile(r"[a-z][a-z0-9]*(\+[a-z0-9]+)?://[!-~]*")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TYPE: Final = re.compile(r"<pool type='([a-z][a-z-]{0,31})'>")


def is_uri(text: str) -> bool:
    """Tell whether this could be libvirt's address of a host: `qemu:///system`, say."""
    return _URI.fullmatch(text) is not None


def pool_of(path: str, uri: str) -> str:
    """Give the type of the pool that has a volume of this path, as libvirt spells it; empty when none has.

    Raises:
        OSError: it could not be asked; `strerror` is a sentence.
    """
    if not path.startswith("/"):
        return ""
    try:
        uuid = _run(uri, "vol-pool", "--uuid", path).strip()
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
    command = ["virsh", "--quiet", "--readonly", "--connect", uri, *words]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWERS_WITHIN_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as exc:
        raise OSError(0, f"libvirt at {uri} did not answer within {ANSWERS_WITHIN_S:g} s") from exc
    except OSError as exc:
        raise OSError(0, f"virsh cannot be run: {exc.strerror or exc}") from exc
    if done.returncode == 0:
        return done.stdout[:MAX_SAID_BYTES].decode("utf-8", "replace")
    said = done.stderr[-1000:].decode("utf-8", "replace")
    if _NOT_A_VOLUME in said:
        raise _NotAVolumeError
    reasons = [line.removeprefix("error: ").strip() for line in said.splitlines() if line.strip()]
    raise OSError(0, f"libvirt at {uri}: {reasons[-1][:200] if reasons else 'no reason given'}")
