"""Guest RAM and keys stay out of core dumps: of this process, and of every guest's that it starts.

Law: nothing of a guest is written to a file of ours; what the kernel would write, it is told not to.
"""

from __future__ import annotations

import resource
from typing import Final

__all__ = ["leave_no_core"]

# Not 0: a `core_pattern` that is a pipe (systemd-coredump, apport) ignores 0, and is refused by 1 alone, which is also
# less than any core file (fs/coredump.c, since Linux 2.6.32).
NO_CORE_BYTES: Final = 1


def leave_no_core() -> None:
    """Have the kernel write no core of this process and of those that it starts.

    Batches of pages on their way and session keys lie in ordinary memory. The hard limit stays, so that who must look
    into a dead agent can: `prlimit --core=unlimited --pid PID`.
    """
    _, hard_bytes = resource.getrlimit(resource.RLIMIT_CORE)
    # A hard limit of 0 forbids more; then there is no core file either, and a pipe is the host's wish.
    resource.setrlimit(resource.RLIMIT_CORE, (NO_CORE_BYTES if hard_bytes else 0, hard_bytes))
