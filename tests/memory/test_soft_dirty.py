from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from memory import linux
from memory.dirty import TrackedArea, TrackerSupport, probe_kernel
from memory.errors import TrackerError
from memory.layout import PAGE_BYTES
from memory.runs import Gfns
from memory.soft_dirty import SoftDirtyTracker
from tests.contracts.dirty_tracker import TOTAL_PAGES, DirtyTrackerContract

WORKS = probe_kernel().soft_dirty
AREA = TrackedArea(address=PAGE_BYTES, pages=1, first_gfn=0)


class OwnMemory:
    """Memory of this process, which stands still whenever it harvests."""

    def __init__(self) -> None:
        self._mapping = mmap.mmap(-1, TOTAL_PAGES * PAGE_BYTES)
        self._words = np.frombuffer(self._mapping, dtype=np.uint64).reshape(TOTAL_PAGES, -1)
        area = TrackedArea(address=self._words.ctypes.data, pages=TOTAL_PAGES, first_gfn=0)
        self.tracker = SoftDirtyTracker(os.getpid(), (area,))

    def write(self, gfns: Gfns) -> None:
        self._words[gfns, 0] += 1

    def close(self) -> None:
        self.tracker.stop()
        del self._words
        self._mapping.close()


@pytest.mark.skipif(not WORKS, reason="this kernel is built without CONFIG_MEM_SOFT_DIRTY")
class TestSoftDirtyTracker(DirtyTrackerContract):
    @pytest.fixture
    def tracked(self) -> Iterator[OwnMemory]:
        memory = OwnMemory()
        yield memory
        memory.close()


@pytest.mark.skipif(WORKS, reason="this kernel marks soft-dirty pages")
def test_a_kernel_without_the_bit_is_told_in_plain_words() -> None:
    tracker = SoftDirtyTracker(os.getpid(), (AREA,))
    with pytest.raises(TrackerError, match=r"CONFIG_MEM_SOFT_DIRTY.*Linux 6\.7"):
        tracker.start()
    tracker.stop()


def test_the_bits_of_the_page_table_become_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any kernel: a page table that is written here, of two areas and more entries than one read takes."""
    entries = np.zeros(20, dtype=np.uint64)
    entries[[2, 3, 7, 11, 13]] = linux.PM_SOFT_DIRTY | 1
    entries[[4, 12]] = 1
    supported = TrackerSupport(uffd_wp=False, soft_dirty=True, problems=())
    monkeypatch.setattr("memory.soft_dirty.probe_kernel", lambda: supported)
    monkeypatch.setattr("memory.soft_dirty._ENTRIES", 3)
    monkeypatch.setattr(os, "pread", lambda fd, size, at: entries.tobytes()[at : at + size])
    monkeypatch.setattr(os, "write", lambda fd, octets: len(octets))
    areas = (
        TrackedArea(address=10 * PAGE_BYTES, pages=4, first_gfn=100),
        TrackedArea(address=2 * PAGE_BYTES, pages=6, first_gfn=0),
    )
    tracker = SoftDirtyTracker(os.getpid(), areas)
    tracker.start()
    assert tracker.harvest().tolist() == [[0, 2], [5, 1], [101, 1], [103, 1]]
    with pytest.raises(TrackerError, match="running already"):
        tracker.start()
    entries = entries[:5]
    with pytest.raises(TrackerError, match="has ended"):
        tracker.harvest()
    tracker.stop()
    tracker.stop()
    with pytest.raises(TrackerError, match="not running"):
        tracker.harvest()


def test_a_process_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    supported = TrackerSupport(uffd_wp=False, soft_dirty=True, problems=())
    monkeypatch.setattr("memory.soft_dirty.probe_kernel", lambda: supported)
    with pytest.raises(TrackerError, match="No such file"):
        SoftDirtyTracker(1 << 30, (AREA,)).start()
