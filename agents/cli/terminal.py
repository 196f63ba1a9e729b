"""A person's terminal at the serial port of a guest.

Law: what the guest prints goes to the terminal as it is, because that was asked for; the terminal is as before when
this ends, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import anyio

__all__ = ["LEAVE", "attach_to"]

LEAVE: Final = b"\x1d"  # Ctrl-], as in telnet and virsh
_CHUNK_BYTES: Final = 4096


async def attach_to(socket: Path) -> None:
    """Join the terminal and the socket until either ends or the person leaves."""
    source, sink = sys.stdin.fileno(), sys.stdout.fileno()
    async with await anyio.connect_unix(socket) as stream, anyio.create_task_group() as tasks:

        async def show() -> None:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    _write_all(sink, await stream.receive(_CHUNK_BYTES))
            tasks.cancel_scope.cancel()

        with _raw(source):
            tasks.start_soon(show)
            while True:
                await anyio.wait_readable(source)
                typed = os.read(source, _CHUNK_BYTES)
                before, leave, _ = typed.partition(LEAVE)
                if before:
                    await stream.send(before)
                if leave or not typed:
                    break
            tasks.cancel_scope.cancel()


def _write_all(sink: int, text: bytes) -> None:
    while text:
        text = text[os.write(sink, text) :]


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """Give every key to the guest as it is pressed; nothing changes where there is no terminal."""
    if not os.isatty(terminal):
        yield
        return
    before = termios.tcgetattr(terminal)
    try:
        tty.setraw(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
