"""Processes of guests: to start one, and to see that one has ended."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

__all__ = ["has_ended", "run_to_end"]


def has_ended(pidfd: int, timeout_s: float = 0.0) -> bool:
    """Wait for the end of the process behind a pidfd, at most so long. Blocks."""
    return bool(_readable([pidfd], timeout_s))


def run_to_end(
    argv: Sequence[str],
    *,
    cwd: Path,
    timeout_s: float,
    output: IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
    abort: int | None = None,
) -> int:
    """Run a program until it has put its guest into the background; give the code that it ended with. Blocks.

    It has a session of its own: no signal to our group or terminal reaches the guest. When `abort`, a descriptor,
    becomes readable the program is killed, and the code says so: that of the signal.

    `output` takes what it prints, else that goes where ours does. The timeout of subprocess's own wait looks whether
    the program has ended after 0.5 ms, 1.5, 3.5 and so on, then every 50: one that is up after 65 ms is seen after 113.

    Raises:
        subprocess.TimeoutExpired: it was killed; what it has put into the background was not.
        OSError: it cannot be executed.
    """
    with subprocess.Popen(
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=pass_fds,
        start_new_session=True,
    ) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            ready = _readable([pidfd] if abort is None else [pidfd, abort], timeout_s)
            if pidfd not in ready:
                process.kill()
            if not ready:
                raise subprocess.TimeoutExpired(argv, timeout_s)
        finally:
            os.close(pidfd)
        return process.wait()


def _readable(descriptors: Sequence[int], timeout_s: float) -> list[int]:
    poll = select.poll()
    for one in descriptors:
        poll.register(one, select.POLLIN)
    return [one for one, _ in poll.poll(timeout_s * 1000)]
