"""What both ends of the data plane do with a socket and a thread.

Law: a socket is shut down by anybody, closed only by its owner: a number of a closed socket may belong to
another file already.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import anyio
import anyio.lowlevel
import anyio.to_thread

__all__ = ["prepare_socket", "run_interruptibly", "shut_down"]

# A silent link is known to be dead after 10 + 3 * 5 seconds without a byte, and after 15 with bytes under way.
_KEEPALIVE_IDLE_S: Final = 10
_KEEPALIVE_INTERVAL_S: Final = 5
_KEEPALIVE_PROBES: Final = 3
_UNACKED_MS: Final = 15_000


def prepare_socket(sock: socket.socket) -> None:
    """Set what every TCP connection of ours has; other sockets are left alone.

    The send and receive buffers stay with the kernel's own tuning: setting them switches it off.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKED_MS)


def shut_down(sock: socket.socket) -> None:
    """End both directions of a socket: whoever is blocked on it wakes up. Never fails."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


async def run_interruptibly(
    work: Callable[[], None], interrupt: Callable[[], None], limiter: anyio.CapacityLimiter
) -> None:
    """Run blocking work in a thread; a cancellation calls `interrupt` and then waits for the thread's end.

    Raises what `work` raises, itself and not in a group; nothing of it after a cancellation.
    """
    failure: BaseException | None = None
    is_done = False

    async def watch() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            if not is_done:
                interrupt()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        try:
            await anyio.to_thread.run_sync(work, limiter=limiter)
        except Exception as exc:
            failure = exc
        finally:
            is_done = True
        tasks.cancel_scope.cancel()
    # With asyncio no wait has told of a cancellation yet, where `watch` has ended before the thread.
    await anyio.lowlevel.checkpoint_if_cancelled()
    if failure is not None:
        raise failure
