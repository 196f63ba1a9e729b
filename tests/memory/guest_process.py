"""A process that has guest RAM mapped twice, half and half, writes to it when told, and makes userfaultfds.

Run as `python -m tests.memory.guest_process RAM_FD SOCKET_FD PAGES` with both descriptors inherited; the socket
carries one JSON request a packet, each with one JSON reply.
"""

from __future__ import annotations

import array
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memory import linux
from memory.dirty import TrackedArea
from memory.layout import PAGE_BYTES
from memory.runs import Gfns
from memory.uffd_wp import UffdWpTracker, open_uffd

__all__ = ["GuestProcess"]

PACKET_BYTES = 1 << 17
REPOSITORY = Path(__file__).resolve().parent.parent.parent


class GuestProcess:
    """The test's end: starts the process over a RAM file of `pages` pages, an even number."""

    def __init__(self, ram_fd: int, pages: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(ram_fd), str(theirs.fileno()), str(pages)],
                pass_fds=(ram_fd, theirs.fileno()),
                cwd=REPOSITORY,
            )
        self._socket = ours
        self._socket.settimeout(30)
        self._pages = pages

    @property
    def pid(self) -> int:
        return self._process.pid

    def track(self, *, keep_copy: bool = False) -> UffdWpTracker:
        """Give a tracker that is not started. The process may keep a copy of the userfaultfd."""
        self._socket.send(json.dumps({"do": "keep" if keep_copy else "open"}).encode())
        packet, fds, _, _ = socket.recv_fds(self._socket, PACKET_BYTES, 1)
        first, second = json.loads(packet)
        half = self._pages // 2
        areas = (
            TrackedArea(address=second, pages=half, first_gfn=half),
            TrackedArea(address=first, pages=half, first_gfn=0),
        )
        return UffdWpTracker(fds[0], self.pid, areas)

    def write(self, gfns: Gfns) -> None:
        """Add 1 to the first word of each page."""
        self._ask({"do": "write", "gfns": gfns.tolist()})

    def tell(self, what: Literal["run", "halt", "unregister"]) -> int:
        """`run` writes to random pages without end, `halt` gives the number of writes, `unregister` the copy."""
        return self._ask({"do": what})

    def kill(self) -> None:
        """End it as SIGKILL does, and wait until it has."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def _ask(self, request: dict[str, object]) -> int:
        self._socket.send(json.dumps(request).encode())
        return int(json.loads(self._socket.recv(PACKET_BYTES)))


class _Guest:
    def __init__(self, ram_fd: int, pages: int) -> None:
        self._half = pages // 2
        size_bytes = self._half * PAGE_BYTES
        self._low = mmap.mmap(ram_fd, size_bytes)
        self._high = mmap.mmap(ram_fd, size_bytes, offset=size_bytes)
        self._halves = (self._words(self._low), self._words(self._high))
        self._stopping = threading.Event()
        self._runner = threading.Thread()
        self._writes = 0
        self._copy = -1

    @property
    def addresses(self) -> tuple[int, int]:
        return (self._halves[0].ctypes.data, self._halves[1].ctypes.data)

    def write(self, gfns: Gfns) -> int:
        low, high = gfns[gfns < self._half], gfns[gfns >= self._half] - self._half
        self._halves[0][low, 0] += 1
        self._halves[1][high, 0] += 1
        return len(gfns)

    def run(self) -> int:
        self._runner = threading.Thread(target=self._write_at_random)
        self._runner.start()
        return 0

    def halt(self) -> int:
        self._stopping.set()
        self._runner.join()
        self._stopping.clear()
        return self._writes

    def hand_over(self, sock: socket.socket, *, keep_copy: bool) -> None:
        uffd = open_uffd()
        packet = json.dumps(self.addresses).encode()
        sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))])
        if keep_copy:
            self._copy = uffd
        else:
            os.close(uffd)

    def unregister(self) -> int:
        linux.uffd_unregister(self._copy, self.addresses[1], self._half * PAGE_BYTES)
        os.close(self._copy)
        return 0

    def _write_at_random(self) -> None:
        rng = np.random.default_rng(3)
        while not self._stopping.is_set():
            # Few pages at a time: each turn is a write that can fall into the middle of a harvest.
            self._writes += self.write(np.unique(rng.integers(0, 2 * self._half, 16)))

    @staticmethod
    def _words(mapping: mmap.mmap) -> NDArray[np.uint64]:
        return np.frombuffer(mapping, dtype=np.uint64).reshape(-1, PAGE_BYTES // 8)


def _main(ram_fd: int, socket_fd: int, pages: int) -> None:
    guest = _Guest(ram_fd, pages)
    with socket.socket(fileno=socket_fd) as sock:
        while packet := sock.recv(PACKET_BYTES):
            request = json.loads(packet)
            match request["do"]:
                case "open" | "keep" as do:
                    guest.hand_over(sock, keep_copy=do == "keep")
                    continue
                case "write":
                    reply = guest.write(np.array(request["gfns"], dtype=np.int64))
                case "run":
                    reply = guest.run()
                case "halt":
                    reply = guest.halt()
                case "unregister":
                    reply = guest.unregister()
                case unknown:
                    raise ValueError(unknown)
            sock.send(json.dumps(reply).encode())


if __name__ == "__main__":
    _main(*(int(argument) for argument in sys.argv[1:]))
