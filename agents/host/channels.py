"""Who is connected to the control listener now: how many connections a peer has, and with which certificate.

Law: no I/O. A connection is a cancel scope here; whoever serves it ends when that is cancelled, and closes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import anyio

from transport.tls import Identity

__all__ = ["MAX_CHANNELS_PER_PEER", "Channels", "OpenChannel"]

# A host has one for each guest that it brings, at most 64 ([limits] incoming), and a second one for a moment when a
# link broke; operators have a few, each with a watcher. Each costs a task and about 100 KiB of TLS.
MAX_CHANNELS_PER_PEER: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenChannel:
    """One connection whose peer has proved who it is."""

    peer: Identity
    address: str
    serial: str
    scope: anyio.CancelScope


class Channels:
    """The connections that are open."""

    def __init__(self) -> None:
        self._open: list[OpenChannel] = []

    def refusal(self, peer: Identity) -> str | None:
        """Say why the peer may not have one more connection now; None: it may."""
        count = sum(1 for channel in self._open if channel.peer == peer)
        if count < MAX_CHANNELS_PER_PEER:
            return None
        return f"{peer} has {count} connections to this host already, and no more are taken; close some"

    @contextmanager
    def held(self, peer: Identity, address: str, serial: str) -> Iterator[OpenChannel]:
        """Count a connection while it is served; what runs in the block ends when it is cut."""
        with anyio.CancelScope() as scope:
            channel = OpenChannel(peer=peer, address=address, serial=serial, scope=scope)
            self._open.append(channel)
            try:
                yield channel
            finally:
                self._open.remove(channel)

    def cut(self, revoked: frozenset[str]) -> list[OpenChannel]:
        """End the connections of these certificates; give them."""
        found = [channel for channel in self._open if channel.serial in revoked]
        for channel in found:
            channel.scope.cancel()
        return found
