"""How many pages travel in one payload: more of them where the link carries those in a moment.

Law: pure; it is told bytes and times. A payload costs both hosts some 0.7 ms of CPU beside what its pages cost, so
large ones save a tenth of it (`python -m bench qemu --rows 1gbit_wr10`, 2 vCPUs: 2.48 CPU seconds at commit 38c1cf1,
where all had 128 pages, and 2.30 at 53941d0). Small ones are for links that are slow: a link that breaks again and
again brings a small record over before it does, and the last one of a round is not late.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from memory.codec import MAX_BATCH_PAGES

__all__ = ["LARGE_BATCH_PAGES", "SMALL_BATCH_PAGES", "BatchSize"]

SMALL_BATCH_PAGES: Final = 128
LARGE_BATCH_PAGES: Final = MAX_BATCH_PAGES
# A large record of pages that do not compress is on its way for 30 ms then, or 60 beside that of a second connection.
FAST_BYTES_PER_S: Final = 32 << 20
# Some batches at least are acknowledged between two looks. What stood idle before counts as slow: a round that is over
# sooner has small ones.
LOOK_EVERY_S: Final = 0.05


class BatchSize:
    """The size of the next batch, by what the link has carried just now. Whoever calls holds a lock.

    Args:
        acked: bytes of payload that the peer has.
    """

    def __init__(self, acked: Callable[[], int]) -> None:
        self._acked = acked
        # What was acknowledged at the last look, and when that was.
        self._seen_bytes, self._seen_s = 0, -math.inf
        self._pages = SMALL_BATCH_PAGES

    def pages(self, now_s: float) -> int:
        """Give how many pages the next batch has at most."""
        took_s = now_s - self._seen_s
        if took_s >= LOOK_EVERY_S:
            acked = self._acked()
            is_fast = acked - self._seen_bytes >= FAST_BYTES_PER_S * took_s
            self._pages = LARGE_BATCH_PAGES if is_fast else SMALL_BATCH_PAGES
            self._seen_bytes, self._seen_s = acked, now_s
        return self._pages
