"""The dirty log of a QEMU guest: taken from its process when a migration starts, gone with it.

Law: blocking, for worker threads. `stealer` makes the userfaultfd; `memory.uffd_wp` reads the log. The process is left
as it was in every case, also when this agent is killed: it keeps no copy of the file.
"""

from __future__ import annotations

import platform
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from agents.capabilities import handed_down
from agents.hypervisors.qemu.errors import InjectionFailed
from agents.hypervisors.qemu.processmap import threads_to_trace
from memory.dirty import TrackedArea, probe_kernel
from memory.errors import TrackerError
from memory.runs import Runs
from memory.soft_dirty import SoftDirtyTracker
from memory.uffd_wp import UffdWpTracker

__all__ = ["PausedHarvests", "QemuTracker", "steal_uffd"]

# The program that steals takes 30 ms; on a host that is very busy some tries more.
STEAL_TIMEOUT_S: Final = 20.0
_STEALER: Final = Path(__file__).with_name("stealer.py")
_MAX_ANSWER_BYTES: Final = 1024


def steal_uffd(pid: int, threads: Sequence[int]) -> int:
    """Make a userfaultfd inside the process and take it; the caller owns it.

    Raises:
        InjectionFailed: no thread could be used; the process is as it was.
    """
    if platform.machine() != "x86_64":
        raise InjectionFailed(
            f"on {platform.machine()} no system call can be injected into QEMU, so that its writes cannot be seen"
        )
    failure = "it has no thread"
    for tid in threads:
        uffd, failure = _steal(pid, tid)
        if uffd is not None:
            return uffd
    raise InjectionFailed(
        f"process {pid} cannot be traced: {failure}. An agent of the guest's own user or root can, unless another "
        "debugger holds it or kernel.yama.ptrace_scope forbids it"
    )


def _steal(pid: int, tid: int) -> tuple[int | None, str]:
    """Give the file, or why there is none."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-I", "-S", str(_STEALER), str(pid), str(tid), str(theirs.fileno())]
        # A session of its own, and never killed: see the law of `stealer`. It ends by itself, at the latest after 2 s.
        with (
            handed_down(),
            subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            ) as child,
        ):
            theirs.close()
            if not select.select([ours], [], [], STEAL_TIMEOUT_S)[0]:
                return None, f"no answer within {STEAL_TIMEOUT_S:g} s"
            answer, fds, _, _ = socket.recv_fds(ours, _MAX_ANSWER_BYTES, 1)
            child.wait()
    if fds:
        return fds[0], ""
    return None, answer.decode(errors="replace").partition(" ")[2] or "the program that does it ended"


class QemuTracker:
    """`migrate.ports.DirtyTracker` of one QEMU process.

    Args:
        standstill: runs a harvest while the guest stands still, for kernels whose log needs that.
    """

    def __init__(
        self,
        pid: int,
        vcpu_threads: Sequence[int],
        areas: tuple[TrackedArea, ...],
        standstill: Callable[[Callable[[], Runs]], Runs],
    ) -> None:
        self._pid = pid
        self._vcpu_threads = tuple(vcpu_threads)
        self._areas = areas
        self._standstill = standstill
        self._log: UffdWpTracker | PausedHarvests | None = None

    @property
    def method(self) -> str:
        return self._log.method if self._log else "none"

    @property
    def sees_absent(self) -> bool:
        """Whether `absent` can tell."""
        return isinstance(self._log, UffdWpTracker)

    def absent(self) -> Runs:
        """Give the pages that are not in the guest's page table: among them are all that it gave back."""
        if not isinstance(self._log, UffdWpTracker):
            raise TrackerError("this log cannot tell")
        return self._log.absent()

    def start(self) -> None:
        """Begin with an empty log. Raises TrackerError: the guest is as before."""
        if self._log is not None:
            raise TrackerError("this log is running already")
        support = probe_kernel()
        log: UffdWpTracker | PausedHarvests
        if support.uffd_wp:
            try:
                uffd = steal_uffd(self._pid, threads_to_trace(self._pid, self._vcpu_threads))
            except InjectionFailed as exc:
                raise TrackerError(str(exc)) from exc
            log = UffdWpTracker(uffd, self._pid, self._areas)
        elif support.soft_dirty:
            log = PausedHarvests(SoftDirtyTracker(self._pid, self._areas), self._standstill)
        else:
            raise TrackerError(
                "the writes of this guest cannot be seen: "
                + "; ".join(support.problems)
                + ". It can be moved "
                "offline (vmferry move --offline)"
            )
        log.start()
        self._log = log

    def harvest(self) -> Runs:
        """Take the pages written since start or the last harvest, and clear them."""
        if self._log is None:
            raise TrackerError("this log is not running")
        return self._log.harvest()

    def stop(self) -> None:
        """Leave the guest as it was. May be called twice, and before start."""
        log, self._log = self._log, None
        if log is not None:
            log.stop()


class PausedHarvests:
    """A soft-dirty log, whose harvests lose no write only while the guest stands still."""

    def __init__(self, log: SoftDirtyTracker, standstill: Callable[[Callable[[], Runs]], Runs]) -> None:
        self._log = log
        self._standstill = standstill

    @property
    def method(self) -> str:
        return self._log.method

    def start(self) -> None:
        self._log.start()

    def harvest(self) -> Runs:
        return self._standstill(self._log.harvest)

    def stop(self) -> None:
        self._log.stop()
