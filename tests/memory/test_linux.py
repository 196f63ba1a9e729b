from __future__ import annotations

import errno
import mmap
import os
import platform

import numpy as np
import pytest

from memory import linux
from memory.layout import PAGE_BYTES


def test_a_failed_call_has_its_errno_and_its_name() -> None:
    with pytest.raises(OSError, match="fallocate") as error:
        linux.punch_hole(-1, 0, PAGE_BYTES)
    assert error.value.errno == errno.EBADF
    with pytest.raises(OSError, match="fstatfs"):
        linux.fs_magic(-1)


def test_a_memfd_is_no_hugetlbfs() -> None:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        assert linux.fs_magic(fd) not in (0, linux.HUGETLBFS_MAGIC)
    finally:
        os.close(fd)


def test_memory_can_be_had_beforehand_and_given_back() -> None:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 8 * PAGE_BYTES)
        linux.allocate(fd, 0, 4 * PAGE_BYTES)
        assert os.fstat(fd).st_blocks * 512 == 4 * PAGE_BYTES
        linux.punch_hole(fd, PAGE_BYTES, 2 * PAGE_BYTES)
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE_BYTES
        assert os.fstat(fd).st_size == 8 * PAGE_BYTES
    finally:
        os.close(fd)


def test_bytes_are_copied_to_our_own_memory_and_a_missing_page_is_an_error() -> None:
    source = np.frombuffer(os.urandom(2 * PAGE_BYTES), dtype=np.uint8)
    with mmap.mmap(-1, 2 * PAGE_BYTES) as page:
        target = np.frombuffer(page, dtype=np.uint8)
        address = int(target.ctypes.data)
        linux.write_memory(os.getpid(), address, source)
        assert (target == source).all()
        del target
    with pytest.raises(OSError, match="process_vm_writev") as error:
        linux.write_memory(os.getpid(), 1 << 46, source)
    assert error.value.errno == errno.EFAULT


def test_an_unknown_machine_has_no_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(OSError, match="pdp11") as error:
        linux.userfaultfd()
    assert error.value.errno == errno.ENOSYS
