"""Guests' processes put themselves into the background; what starts one runs until then.

Law: a process of its own session: no signal to this one's group or terminal reaches the guest.
"""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

__all__ = ["run_to_end"]


def run_to_end(
    argv: Sequence[str],
    *,
    cwd: Path,
    timeout_s: float,
    output: IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
) -> int:
    """Run a program; give the code that it ended with. Blocks.

    `output` takes what it prints, else that goes where ours does. The timeout of subprocess's own wait looks whether
    the program has ended after 0.5 ms, 1.5, 3.5 and so on, then every 50: one that is up after 65 ms is seen after 113.

    Raises:
        subprocess.TimeoutExpired: it was killed, with nothing that it has put into the background.
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
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                process.kill()
                raise subprocess.TimeoutExpired(argv, timeout_s)
        finally:
            os.close(pidfd)
        return process.wait()
