from __future__ import annotations

import errno

import pytest

from memory import linux
from memory.dirty import TrackedArea, checked_areas, probe_kernel
from memory.errors import TrackerError
from memory.layout import PAGE_BYTES


def area(address: int, pages: int, first_gfn: int) -> TrackedArea:
    return TrackedArea(address=address, pages=pages, first_gfn=first_gfn)


def test_areas_come_in_order_of_gfn() -> None:
    low, high = area(0x9000, 2, 0), area(0x1000, 3, 2)
    assert checked_areas((high, low)) == (low, high)


@pytest.mark.parametrize(
    "areas",
    [
        (),
        (area(0x1000, 0, 0),),
        (area(0x1000, -1, 0),),
        (area(0x1001, 1, 0),),
        (area(-PAGE_BYTES, 1, 0),),
        (area(0x1000, 1, -1),),
        (area(0x1000, 2, 0), area(0x9000, 1, 1)),
        (area(1 << 62, 1 << 60, 0),),
    ],
)
def test_areas_that_cannot_be_are_refused(areas: tuple[TrackedArea, ...]) -> None:
    with pytest.raises(TrackerError):
        checked_areas(areas)


def test_every_method_that_does_not_work_has_its_reason() -> None:
    support = probe_kernel()
    assert len(support.problems) == [support.uffd_wp, support.soft_dirty].count(False)


def test_a_kernel_without_userfaultfd_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(linux, "userfaultfd", refuse)
    support = probe_kernel()
    assert not support.uffd_wp
    assert "Function not implemented" in support.problems[0]


def test_pages_of_another_size_leave_no_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmap.PAGESIZE", 16 * PAGE_BYTES)
    support = probe_kernel()
    assert (support.uffd_wp, support.soft_dirty) == (False, False)
    assert "65536 bytes" in support.problems[0]
