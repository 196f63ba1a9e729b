"""What is at a network disk's URL: asked with QEMU's own tools, through the very block layer that its guest would use.

Law: a URL is hostile until a pattern of [storage] network_disks fits it. Nothing is ever written. What a tool
(`tools`) prints is as long as what it is asked. Blocks.

Source of what they print: QEMU, qapi/block-core.json (ImageInfo) and qemu-io-cmds.c (`read -v`).
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from agents.storageproof import tools
from agents.storageproof.formats import read_head
from agents.storageproof.sectors import MAX_OFFSETS, SECTOR_BYTES, digest_of
from agents.storageproof.urls import (
    GLUSTER,
    ISCSI,
    RBD,
    DiskUrl,
    as_file,
    gluster_words,
    matches,
    parse,
    rbd_words,
)
from migrate.facts import ImageFacts

__all__ = ["look_at_url", "size_of_url"]

_DUMPED: Final = re.compile(rb"^([0-9a-f]{8,16}):  ((?:[0-9a-f]{2} ){1,16})", re.MULTILINE)
_MAX_SIZE_BYTES: Final = 1 << 62
# Only to say why a tool has failed; with ANSWERS_WITHIN_S it stays within the storage's own bound.
_CONNECTS_WITHIN_S: Final = 1.0
# Where the URL's port is that of the service. NFS asks the portmapper for others.
_PORT_IS_ITS_OWN: Final = ("nbd", ISCSI, GLUSTER, "ssh", RBD, "https", "http")


def size_of_url(url: str, patterns: Sequence[str]) -> int:
    """Give the bytes of what is there. Raises OSError, whose `strerror` is a sentence."""
    place = _allowed(url, patterns)
    return _size(place, _named(url, place))


def look_at_url(
    url: str, patterns: Sequence[str], *, offsets: Sequence[int], is_read_only: bool
) -> ImageFacts:
    """Look at a network disk, as `images` does at a file. Its server's room is not seen from here.

    `identity` is where the name leads to from this host: two hosts of one answer have one server.

    Raises:
        OSError: it is not allowed, or could not be asked; `strerror` is a sentence.
    """
    place = _allowed(url, patterns)
    named = _named(url, place)
    identity, size_bytes = _identity(place), _size(place, named)
    write_error = ""
    try:
        first, digests = _sectors(named, offsets, size_bytes, may_write=not is_read_only)
    except OSError as exc:
        if is_read_only:
            raise
        write_error = (exc.strerror or str(exc))[:500]
        first, digests = _sectors(named, offsets, size_bytes, may_write=False)
    head = read_head(first, size_bytes)
    has_more = head.header is not None and bool(head.header.backing or head.header.data_file)
    return ImageFacts(
        name=url.rpartition("/")[2],
        identity=identity,
        size_bytes=size_bytes,
        virtual_bytes=head.virtual_bytes,
        digests=digests,
        is_direct=True,
        write_error=write_error,
        format=head.format,
        snapshots=head.snapshots,
        chain_error=head.error or ("what lies under a network disk is not looked at" if has_more else ""),
    )


def _allowed(url: str, patterns: Sequence[str]) -> DiskUrl:
    place = parse(url) if matches(url, patterns) else None
    if place is None:
        raise OSError(0, f"{url[:200]} is none of this host's network disks ([storage] network_disks)")
    return place


def _size(place: DiskUrl, named: _Named) -> int:
    # Ceph's library asks on for minutes where nobody answers.
    if place.scheme == RBD and (why := _why_unreachable(place)):
        raise OSError(0, why)
    try:
        told = named.ask("qemu-img", "info", "--force-share", "--output=json")
    except _ToolFailedError as exc:
        # Not every driver of QEMU says that nobody has answered it.
        raise OSError(0, _why_unreachable(place) or exc.strerror) from exc
    try:
        size = json.loads(told)["virtual-size"]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise OSError(0, "qemu-img did not say how large it is") from exc
    if not isinstance(size, int) or not 0 <= size < _MAX_SIZE_BYTES:
        raise OSError(0, f"qemu-img said that it has {size!r:.40} bytes")
    return size


def _sectors(
    named: _Named, offsets: Sequence[int], size_bytes: int, *, may_write: bool
) -> tuple[bytes, tuple[bytes, ...]]:
    """Give the first sector, and digests of those that were asked for; one that is not there gives an empty digest.

    One that the guest may write is opened as it is by its QEMU. It is read from all the same.
    """
    lengths = {
        offset: min(SECTOR_BYTES, size_bytes - offset)
        for offset in (0, *offsets[:MAX_OFFSETS])
        if 0 <= offset < size_bytes and offset % SECTOR_BYTES == 0
    }
    words = [word for offset, length in lengths.items() for word in ("-c", f"read -v {offset} {length}")]
    rights = () if may_write else ("-r", "-U")
    told = named.ask("qemu-io", *rights, *(words or ("-c", "quit")), may_write=may_write)
    found: dict[int, bytearray] = {}
    for at, dumped in _DUMPED.findall(told):
        where = int(at, 16)
        found.setdefault(where - where % SECTOR_BYTES, bytearray()).extend(bytes.fromhex(dumped.decode()))
    whole = {offset: bytes(found.get(offset, b"")) for offset, length in lengths.items()}
    return whole.get(0, b""), tuple(
        digest_of(content) if (content := whole.get(offset)) and len(content) == lengths[offset] else b""
        for offset in offsets[:MAX_OFFSETS]
    )


def _named(url: str, place: DiskUrl) -> _Named:
    seconds = f"{tools.ANSWERS_WITHIN_S:g} s"
    if place.scheme == GLUSTER:
        words = gluster_words(place)
        return _Named(
            words=("-f", "raw", url),
            silent=f"its server gave no answer within {seconds}; is there a file {words['path']} in its volume "
            f"{words['volume']} that this host may open? "
            "(Gluster's library takes ten seconds to say that there is not.)",
            closes_slowly=True,
        )
    if place.scheme != RBD:
        return _Named(
            words=("-f", "raw", url),
            silent=f"its server gave no answer within {seconds}; does it take several clients at once "
            "(qemu-nbd --shared=0)?",
        )
    user = place.user or "admin"
    return _Named(
        words=("--image-opts", f"driver=raw,{as_file({'driver': RBD} | rbd_words(place))}"),
        # Ceph's library takes a key that is missing or wrong for a monitor that is busy.
        silent=f"its Ceph gave no answer to client.{user} within {seconds}; is the key of client.{user} where Ceph "
        f"looks for it here (/etc/ceph/ceph.client.{user}.keyring, readable by the agent), and is the Ceph healthy?",
    )


def _identity(place: DiskUrl) -> str:
    """Give the URL with the addresses that its server's name has here."""
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise OSError(0, f"its server {place.host} has no address here: {exc}") from exc
    addresses = sorted({str(address[0]) for *_, address in found})
    return " or ".join(replace(place, host=address).words for address in addresses)[:500]


def _why_unreachable(place: DiskUrl) -> str:
    """Say why no connection to its server can be made, or nothing."""
    if place.scheme not in _PORT_IS_ITS_OWN:
        return ""
    try:
        socket.create_connection((place.host, place.port), _CONNECTS_WITHIN_S).close()
    except OSError as exc:
        return f"its server {place.authority} cannot be reached: {exc.strerror or exc}"
    return ""


class _ToolFailedError(OSError):
    """A tool was asked and says no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """A disk as QEMU's tools are told of it, and what it means that they are silent.

    The last of `words` is the one that their errors repeat. libgfapi 10 keeps whoever closes a file for ten seconds.
    """

    words: tuple[str, ...]
    silent: str
    closes_slowly: bool = False

    def ask(self, *program: str, may_write: bool = False) -> bytes:
        """Give what a tool prints. Raises OSError, whose `strerror` is a sentence; _ToolFailedError: it says no."""
        if not self.closes_slowly:
            return self._told(program, self.words)
        rights = () if may_write else ("--read-only",)
        with tools.serving(*rights, *self.words, silent=self.silent) as server:
            try:
                return self._told(program, ("-f", "raw", server.url))
            except _ToolFailedError as exc:
                if (said := server.last_words()) is None:
                    raise
                raise _refusal("qemu-nbd", said, self.words[-1]) from exc

    def _told(self, program: tuple[str, ...], words: tuple[str, ...]) -> bytes:
        done = tools.run(*program, *words, silent=self.silent)
        if done.returncode:
            raise _refusal(program[0], done.stderr.decode(errors="replace"), words[-1])
        return done.stdout


def _refusal(program: str, said: str, name: str) -> _ToolFailedError:
    """Give what a tool has said as its cause, without the image's name: who reads it knows which it is."""
    lines = said.strip().splitlines() or [""]
    # Libraries of QEMU's drivers have logs of their own there.
    own = next((line for line in lines if line.startswith(f"{program}: ")), lines[0])
    cause = own.partition(name)[2].lstrip("': ") or own
    if "Unknown protocol" in own:
        cause = f"QEMU has no driver for it here (Debian: qemu-block-extra, Fedora: qemu-block-*): {cause}"
    return _ToolFailedError(0, cause[:300] or f"{program} has failed")
