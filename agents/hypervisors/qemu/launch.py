"""Starting a QEMU from a spec, and ending one.

Law: the arguments are `cmdline`'s, the paths this host's; nothing of a peer becomes an argument here. A guest is no
child that ends with its agent: QEMU puts itself into the background, once it has got that far.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents.hypervisors.processes import has_ended, run_to_end
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.cmdline import HostPaths, argv_of
from agents.hypervisors.qemu.errors import NotAllowed, QemuGone
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.rundir import QemuPaths, prepare_dir
from agents.hypervisors.qemu.spec import QemuSpec
from agents.storageproof.urls import is_remote
from transport.flow import Waker
from transport.sockets import run_interruptibly

__all__ = ["UNUSED_CLOSES_WITHIN_S", "Process", "end", "launch"]

# RAM of huge pages that is filled beforehand is what takes long.
START_TIMEOUT_S: Final = 60.0
# Giving back 64 GiB of RAM.
END_TIMEOUT_S: Final = 10.0
# What its guest has written may have to go to a server yet. One whose guest has gone on elsewhere, or has not run, has
# nothing of it: the library of a Gluster disk alone would keep it for ten seconds.
CLOSES_WITHIN_S: Final = 10.0
UNUSED_CLOSES_WITHIN_S: Final = 2.0
_QUIT_TIMEOUT_S: Final = 2.0
_MAX_WORDS_BYTES: Final = 2000


class Process:
    """A process that is known by a pidfd: its number is never taken for another's."""

    def __init__(self, pid: int) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as exc:
            raise QemuGone(f"process {pid} has ended") from exc
        self.pid: Final = pid

    def has_ended(self, timeout_s: float = 0.0) -> bool:
        """Wait for its end, at most so long. Blocks."""
        return has_ended(self._pidfd, timeout_s)

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Forget it. May be called twice."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


async def launch(spec: QemuSpec, host: QemuHost, *, is_incoming: bool) -> tuple[Qmp, QemuPaths]:
    """Start a machine and connect to it.

    Raises:
        NotAllowed: this host does not let such a machine run, with all reasons.
        QemuGone: it did not start, with QEMU's own words.
    """
    objections = list(host.objections(spec))
    if objections:
        raise NotAllowed(tuple(f"{one.found}. {one.remedy}".rstrip(". ") for one in objections))
    prepare_dir(host.dir)
    paths = QemuPaths.of_guest(host.dir.absolute(), spec.guest_id)
    await _make_way(paths)
    if is_incoming:
        paths.incoming.touch(mode=0o600)
    argv = argv_of(
        spec,
        HostPaths(
            binary=host.binary,
            qmp=paths.qmp,
            monitor=paths.monitor,
            console=paths.console,
            console_log=paths.log,
            pid=paths.pid,
            memory_dir=host.memory_dir,
        ),
        is_incoming=is_incoming,
    )
    try:
        await _run(argv, spec)
        return await Qmp.connect(paths.qmp), paths
    except BaseException:
        with anyio.CancelScope(shield=True):
            await _kill_by_pid_file(paths)
        paths.remove()
        raise


async def end(
    qmp: Qmp | None, process: Process, paths: QemuPaths, *, closes_within_s: float = CLOSES_WITHIN_S
) -> None:
    """End a QEMU for good; its RAM is free when this returns. Where it takes longer to close its disks it is killed.

    Raises:
        QemuGone: the kernel does not let it end.
    """
    gives_up_at = anyio.current_time() + closes_within_s
    if qmp is not None:
        # It may have ended before us, which is what we want; one that does not answer is killed.
        with contextlib.suppress(Exception):
            await qmp.execute("quit", timeout_s=min(_QUIT_TIMEOUT_S, closes_within_s))
    left_s = max(gives_up_at - anyio.current_time(), 0.0)

    def wait() -> bool:
        if process.has_ended(left_s):
            return True
        process.kill()
        return process.has_ended(END_TIMEOUT_S)

    if not await anyio.to_thread.run_sync(wait):
        raise QemuGone(f"process {process.pid} does not end, not even by SIGKILL")
    paths.remove()


async def _make_way(paths: QemuPaths) -> None:
    """Remove what a guest of this identity that has ended left; one that runs is in the way.

    Raises:
        QemuGone: it runs.
    """
    try:
        stream = await anyio.connect_unix(paths.qmp)
    except OSError:
        paths.remove()
        return
    await stream.aclose()
    raise QemuGone(f"a guest of this identity runs on this host already ({paths.qmp})")


async def _run(argv: list[str], spec: QemuSpec) -> None:
    """Start it and wait until it is in the background: QEMU has opened its files and sockets by then.

    A cancellation is not kept waiting by a QEMU that waits for something itself.
    """
    code, words = 0, b""
    abort = Waker()

    def run() -> None:
        nonlocal code, words
        # A file, not a pipe, and a thread, not the loop: the guest inherits what this opens, and an end of a pipe that
        # it held would keep the reader waiting.
        with tempfile.TemporaryFile() as output:
            code = run_to_end(
                argv, cwd=Path("/"), timeout_s=START_TIMEOUT_S, output=output, abort=abort.fileno()
            )
            output.seek(0)
            words = output.read()[-_MAX_WORDS_BYTES:]

    try:
        await run_interruptibly(run, abort.wake, anyio.to_thread.current_default_thread_limiter())
    except subprocess.TimeoutExpired as exc:
        raise QemuGone(
            f"QEMU for {spec.name} did not start within {START_TIMEOUT_S:g} s{_waited_for(spec)}"
        ) from exc
    except OSError as exc:
        raise QemuGone(f"{argv[0]} cannot be executed: {exc.strerror}") from exc
    finally:
        abort.close()
    if code != 0:
        said = words.decode(errors="replace").strip()
        raise QemuGone(f"QEMU for {spec.name} did not start: {said or f'it ended with code {code}'}")


def _waited_for(spec: QemuSpec) -> str:
    """Say what keeps a QEMU from starting, without a word of it: a server that takes its connection and is silent."""
    urls = ", ".join(disk.path for disk in spec.disks if is_remote(disk.path))
    if not urls:
        return ""
    return f": does the server answer this host at {urls}, and has a user of Ceph its key here?"


async def _kill_by_pid_file(paths: QemuPaths) -> None:
    with contextlib.suppress(OSError, ValueError, QemuGone):
        process = Process(int(paths.pid.read_text()))
        try:
            process.kill()
            await anyio.to_thread.run_sync(process.has_ended, END_TIMEOUT_S)
        finally:
            process.close()
