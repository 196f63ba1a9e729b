"""Broken links on purpose: in-memory byte streams that break at the N-th operation of either end."""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio
import anyio.abc
import anyio.lowlevel

__all__ = ["Fuse", "FusedStream", "fused_stream_pair"]


@dataclass(slots=True)
class Fuse:
    """Breaks once, at operation `at` (counted from 0 over both ends); never when `at` is None.

    `lose_after_send` says when a send that breaks breaks: after its bytes were delivered, or before.
    """

    at: int | None = None
    lose_after_send: bool = False
    operations: int = field(default=0, init=False)

    @property
    def is_blown(self) -> bool:
        """The break has happened: everything that is connected from now on is whole."""
        return self.at is not None and self.operations > self.at

    def count(self) -> bool:
        """Count one operation; True when it is the one that breaks."""
        self.operations += 1
        return self.at is not None and self.operations == self.at + 1


class _Pipe:
    """Bytes of one direction. Like a socket's, its buffer takes what nobody reads yet."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.is_closed = False
        self.changed = anyio.Event()

    def change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


@dataclass(slots=True)
class _Link:
    """Both directions of one pair. What was delivered before the cut can still be received."""

    pipes: tuple[_Pipe, _Pipe]
    is_cut: bool = False

    def cut(self) -> None:
        self.is_cut = True
        for pipe in self.pipes:
            pipe.is_closed = True
            pipe.change()


class FusedStream(anyio.abc.ByteStream):
    """One end of a pair in memory. Each send and each receive is one operation of the shared fuse."""

    def __init__(self, outgoing: _Pipe, incoming: _Pipe, fuse: Fuse, link: _Link) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._fuse = fuse
        self._link = link
        self._is_closed = False

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        if self._is_closed:
            raise anyio.ClosedResourceError
        if self._outgoing.is_closed:
            raise anyio.BrokenResourceError
        breaks = self._fuse.count()
        if not breaks or self._fuse.lose_after_send:
            self._outgoing.buffer += item
            self._outgoing.change()
        if breaks:
            self._link.cut()
            raise anyio.BrokenResourceError

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if not self._link.is_cut and self._fuse.count():
            self._link.cut()
            raise anyio.BrokenResourceError
        while not self._incoming.buffer:
            if self._is_closed:
                raise anyio.ClosedResourceError
            if self._incoming.is_closed:
                raise anyio.EndOfStream
            await self._incoming.changed.wait()
        data = bytes(self._incoming.buffer[:max_bytes])
        del self._incoming.buffer[:max_bytes]
        return data

    async def send_eof(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._outgoing.is_closed = True
        self._outgoing.change()

    def cut(self) -> None:
        """Break both directions now, as the death of either end does."""
        self._link.cut()

    async def aclose(self) -> None:
        self._is_closed = True
        for pipe in (self._outgoing, self._incoming):
            pipe.is_closed = True
            pipe.change()
        await anyio.lowlevel.checkpoint()


def fused_stream_pair(fuse: Fuse) -> tuple[FusedStream, FusedStream]:
    """Two connected ends. Several pairs may share a fuse: the count goes on over a new connection."""
    there, back = _Pipe(), _Pipe()
    link = _Link((there, back))
    return FusedStream(there, back, fuse, link), FusedStream(back, there, fuse, link)
