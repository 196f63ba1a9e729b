"""How an agent's process is kept small and prompt.

Law: settings of the interpreter and of the C library, each with what it gained; called once, first of all.
Figures: resident memory of an idle agent and after 4 moves of 1 GiB (2 vCPUs, glibc 2.36, CPython 3.11).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from typing import Final

__all__ = ["before_imports", "give_memory_back", "migration_ended", "settle"]

# glibc's mallopt(3) parameters.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
# A thread that copies allocates each batch's compressed or decompressed pages, 1 MiB at most, and frees them. From the
# kernel that is new memory each time, a page fault for each 4 KiB: a tenth of a move's CPU (`python -m bench qemu
# --rows 1gbit_wr10`, 2 vCPUs: 2.84 s at commit d7b46a2, 2.48 at 38c1cf1). So such a block stays in its heap, and so
# does twice as much at the heap's end.
HEAP_BLOCK_BYTES: Final = 2 << 20
HEAP_SPARE_BYTES: Final = 4 << 20
# Threads that copy pages hold the interpreter for up to this long at a time: a fifth of CPython's default, so
# that two of them do not make the event loop late.
SWITCH_INTERVAL_S: Final = 0.001


def before_imports() -> None:
    """Set what numpy and the first big allocation look at; call before numpy is imported."""
    # numpy's BLAS would start a thread per core with buffers of its own, which nothing here uses: 16 MiB less.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # One heap per thread that copies keeps what each once needed: 20 MiB less. What the heaps hold goes back to the
    # kernel when a migration has ended, and while none runs: requests take memory, too.
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt, and other habits
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, HEAP_SPARE_BYTES)


def settle() -> None:
    """Call when everything is imported, before the event loop starts."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # What is there now stays for ever: a full collection in the middle of a switchover need not look at it.
    gc.collect()
    gc.freeze()


def migration_ended() -> None:
    """Give the buffers of a migration back now: 9 MiB at a time.

    asyncio leaves the frames of cancelled tasks, and all that they hold, in cycles, and a full collection may be
    many migrations away. After `settle` one costs 2 ms.
    """
    gc.collect()
    give_memory_back()


def give_memory_back() -> None:
    """Give the kernel what the heaps have free: 0.02 ms where there is none, 4 ms for 64 MiB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
