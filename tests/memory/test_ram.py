from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memory import linux
from memory.errors import LayoutMismatch, OutOfRam, RamGone
from memory.layout import PAGE_BYTES, Layout
from memory.ram import MappedRam, create_ram_file
from memory.runs import expand
from tests.contracts.guest_ram import TOTAL_PAGES, GuestRamContract
from tests.hugepages import huge_pages
from tests.memory.strategies import page, run

SIZES = [("low", 100 * PAGE_BYTES), ("high", (TOTAL_PAGES - 100) * PAGE_BYTES)]
LAYOUT = Layout.of_sizes(SIZES)


@contextlib.contextmanager
def mapped(fd: int, layout: Layout = LAYOUT) -> Iterator[MappedRam]:
    """Give the RAM behind `fd`, which is closed at once: MappedRam keeps its own."""
    try:
        ram = MappedRam(fd, layout)
    finally:
        os.close(fd)
    try:
        yield ram
    finally:
        ram.close()


def unsealed(size_bytes: int = LAYOUT.total_bytes) -> int:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    return fd


def allocated_bytes(ram: MappedRam) -> int:
    return os.fstat(ram._fd).st_blocks * 512


class TestSealedMemfd(GuestRamContract):
    @pytest.fixture
    def ram(self) -> Iterator[MappedRam]:
        with mapped(create_ram_file(LAYOUT, "sealed")) as ram:
            yield ram


class TestUnsealedMemfd(GuestRamContract):
    @pytest.fixture
    def ram(self) -> Iterator[MappedRam]:
        with mapped(unsealed()) as ram:
            yield ram


class TestTmpfsFile(GuestRamContract):
    @pytest.fixture
    def ram(self) -> Iterator[MappedRam]:
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("no tmpfs at /dev/shm to write to")
        fd, path = tempfile.mkstemp(dir="/dev/shm")
        os.unlink(path)
        os.ftruncate(fd, LAYOUT.total_bytes)
        with mapped(fd) as ram:
            yield ram


def huge(layout: Layout) -> int:
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, layout.total_bytes)
    linux.allocate(fd, 0, layout.total_bytes)
    return fd


class TestHugetlbfs:
    """Only what holds for pages of 2 MiB: a hole there is as large as they are."""

    def test_pages_written_are_read_and_zeroed(self) -> None:
        layout = Layout.of_sizes([("ram", 4 << 20)])
        with huge_pages(2), mapped(huge(layout), layout) as ram:
            ram.scatter(run((1, 2), (700, 1)), memoryview(page(1) * 2 + page(2)))
            out = memoryview(bytearray(3 * PAGE_BYTES))
            ram.gather(run((0, 2), (700, 1)), out)
            assert bytes(out) == page(0) + page(1) + page(2)
            ram.scatter_zeros(run((1, 1), (512, 512)))
            ram.gather(run((1, 2), (700, 1)), out)
            assert bytes(out) == page(0) + page(1) + page(0)


@pytest.mark.parametrize("make", [unsealed, lambda: create_ram_file(LAYOUT, "sealed")])
def test_reading_holes_allocates_nothing(make: object) -> None:
    assert callable(make)
    with mapped(make()) as ram:
        ram.scatter(run((5, 10)), memoryview(page(128) * 10))
        ram.populated_runs()
        before = allocated_bytes(ram)
        out = memoryview(bytearray(TOTAL_PAGES * PAGE_BYTES))
        ram.gather(run((0, TOTAL_PAGES)), out)
        ram.gather(run((3, 8), (20, 1)), out)
        ram.gather(run(*((gfn, 1) for gfn in range(0, TOTAL_PAGES, 2))), out)
        assert allocated_bytes(ram) == before == 10 * PAGE_BYTES


def test_zeros_give_the_memory_back() -> None:
    with mapped(create_ram_file(LAYOUT, "ram")) as ram:
        ram.scatter(run((0, 300)), memoryview(page(1) * 300))
        ram.scatter_zeros(run((0, 100), (200, 100)))
        assert allocated_bytes(ram) == 100 * PAGE_BYTES


def test_pages_that_were_zeroed_stay_holes_when_they_are_read() -> None:
    with mapped(create_ram_file(LAYOUT, "ram")) as ram:
        ram.scatter(run((0, 40)), memoryview(page(1) * 40))
        ram.scatter_zeros(run((10, 5)))
        out = memoryview(bytearray(40 * PAGE_BYTES))
        ram.gather(run(*((gfn, 1) for gfn in range(40))), out)
        assert out == page(1) * 10 + page(0) * 5 + page(1) * 25
        assert allocated_bytes(ram) == 35 * PAGE_BYTES


def test_writes_of_the_guest_are_read_by_the_agent_and_the_other_way_round() -> None:
    fd = create_ram_file(LAYOUT, "ram")
    with mmap.mmap(fd, LAYOUT.total_bytes) as guest, mapped(fd) as ram:
        guest[7 * PAGE_BYTES : 8 * PAGE_BYTES] = page(128)
        assert ram.populated_runs().tolist() == [[7, 1]]
        out = memoryview(bytearray(PAGE_BYTES))
        for fill in (129, 130):
            ram.gather(run((7, 1)), out)
            assert out == guest[7 * PAGE_BYTES : 8 * PAGE_BYTES]
            ram.scatter(run((7, 1)), memoryview(page(fill)))
            assert guest[7 * PAGE_BYTES : 8 * PAGE_BYTES] == page(fill)


def test_pages_the_guest_got_after_the_last_look_are_read_right() -> None:
    fd = create_ram_file(LAYOUT, "ram")
    with mmap.mmap(fd, LAYOUT.total_bytes) as guest, mapped(fd) as ram:
        guest[: 40 * PAGE_BYTES] = page(128) * 40
        ram.populated_runs()
        guest[40 * PAGE_BYTES : 42 * PAGE_BYTES] = page(129) * 2
        out = memoryview(bytearray(43 * PAGE_BYTES))
        ram.gather(run(*((gfn, 1) for gfn in range(43))), out)
        assert out == page(128) * 40 + page(129) * 2 + page(0)


def test_a_file_one_byte_too_small_is_refused() -> None:
    fd = unsealed(LAYOUT.total_bytes - 1)
    with pytest.raises(LayoutMismatch, match="the file behind it only"), mapped(fd):
        pass


def test_a_larger_file_is_taken_up_to_the_layout() -> None:
    with mapped(unsealed(LAYOUT.total_bytes + PAGE_BYTES)) as ram:
        os.pwrite(ram._fd, page(1) * 2, LAYOUT.total_bytes - PAGE_BYTES)
        assert ram.populated_runs().tolist() == [[TOTAL_PAGES - 1, 1]]


def test_a_file_that_was_cut_gives_an_error_and_no_signal() -> None:
    with mapped(unsealed()) as ram:
        ram.scatter(run((0, TOTAL_PAGES)), memoryview(page(1) * TOTAL_PAGES))
        ram.populated_runs()
        os.ftruncate(ram._fd, 10 * PAGE_BYTES)
        out = memoryview(bytearray(20 * PAGE_BYTES))
        with pytest.raises(RamGone) as error:
            ram.gather(run((8, 1), (10, 1)), out)
        assert error.value.first_gfn == 10
        with pytest.raises(RamGone):
            ram.gather(run((5, 20)), out)


def test_a_sealed_file_cannot_be_cut() -> None:
    fd = create_ram_file(LAYOUT, "ram")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


def test_runs_past_the_end_and_buffers_of_a_wrong_size_are_our_mistake() -> None:
    with mapped(unsealed()) as ram:
        one = memoryview(bytearray(PAGE_BYTES))
        for runs in (run((TOTAL_PAGES, 1)), run((-1, 1)), run((TOTAL_PAGES - 1, 2))):
            with pytest.raises(ValueError, match="leave the guest"):
                ram.gather(runs, one)
            with pytest.raises(ValueError, match="leave the guest"):
                ram.scatter_zeros(runs)
        with pytest.raises(ValueError, match="no room"):
            ram.gather(run((0, 2)), one)
        with pytest.raises(ValueError, match="not 2 pages"):
            ram.scatter(run((0, 2)), one)


def test_threads_write_and_read_different_pages_at_once() -> None:
    with mapped(create_ram_file(LAYOUT, "ram")) as ram:
        failures: list[str] = []

        def work(start: int) -> None:
            runs = run(*((gfn, 1) for gfn in range(start, TOTAL_PAGES, 4)))
            out = memoryview(bytearray(len(runs) * PAGE_BYTES))
            for turn in range(6):
                pages = np.random.default_rng(start + 10 * turn).bytes(out.nbytes)
                ram.scatter(runs, memoryview(pages))
                ram.gather(runs, out)
                if out != pages:
                    failures.append(f"worker {start} turn {turn}")
                if turn == 2:
                    ram.scatter_zeros(runs)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={64 * PAGE_BYTES}".encode()
    if libc.mount(b"none", bytes(tmp_path), b"tmpfs", ctypes.c_ulong(0), options) != 0:
        pytest.skip("needs root, and a container that lets it mount a tmpfs")
    yield tmp_path
    assert libc.umount2(bytes(tmp_path), 0) == 0


def test_a_full_tmpfs_is_out_of_ram_and_no_signal(small_tmpfs: Path) -> None:
    fd = os.open(small_tmpfs / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, LAYOUT.total_bytes)
    with mapped(fd) as ram:
        ram.scatter(run((0, 60)), memoryview(page(1) * 60))
        with pytest.raises(OutOfRam) as error:
            ram.scatter(run((70, 1), (100, 10)), memoryview(page(2) * 11))
        assert 100 <= error.value.first_gfn < 110
        out = memoryview(bytearray(300 * PAGE_BYTES))
        ram.gather(run((0, 300)), out)  # holes are read although there is no page left for them
        got = np.frombuffer(out, dtype=np.uint8).reshape(-1, PAGE_BYTES)
        assert (got[expand(run((0, 60)))] == 1).all()
        ram.scatter_zeros(run((0, 60)))
        ram.scatter(run((100, 10)), memoryview(page(2) * 10))


def test_a_kernel_that_refuses_memory_is_out_of_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    with mapped(create_ram_file(LAYOUT, "ram")) as ram:

        def refuse(fd: int, buffers: object, offset: int) -> int:
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(os, "pwritev", refuse)
        with pytest.raises(OutOfRam) as error:
            ram.scatter(run((3, 2)), memoryview(page(1) * 2))
        assert (error.value.first_gfn, error.value.wanted_bytes) == (3, 2 * PAGE_BYTES)


class _Owner:
    """A mapping of a RAM file, as a guest's process has one; here the process is this one."""

    def __init__(self, fd: int) -> None:
        self.mapping = mmap.mmap(fd, LAYOUT.total_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))


class TestRamFilledThroughItsOwner(GuestRamContract):
    @pytest.fixture
    def ram(self) -> Iterator[MappedRam]:
        fd = create_ram_file(LAYOUT, "owned")
        owner = _Owner(fd)
        ram = MappedRam(fd, LAYOUT, owner=(os.getpid(), owner.address))
        os.close(fd)
        yield ram
        ram.close()


def test_new_pages_are_made_by_the_owner() -> None:
    fd = create_ram_file(LAYOUT, "owned")
    owner = _Owner(fd)
    ram = MappedRam(fd, LAYOUT, owner=(os.getpid(), owner.address))
    os.close(fd)
    present = _present_pages(owner.address)
    ram.scatter(run((0, 64)), memoryview(page(1) * 64))
    assert _present_pages(owner.address) == present + 64
    ram.close()


def test_an_owner_that_is_gone_is_an_error_and_no_end_of_ours() -> None:
    with mapped(create_ram_file(LAYOUT, "owned")) as plain:
        ram = MappedRam(plain._fd, LAYOUT, owner=(os.getpid(), 1 << 46))
        with pytest.raises(OutOfRam):
            ram.scatter(run((0, 1)), memoryview(page(1)))
        ram.close()


def _present_pages(address: int) -> int:
    """Count the pages of the RAM that are in this process's page table at an address."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // PAGE_BYTES * 8)
        entries = np.frombuffer(pagemap.read(LAYOUT.total_pages * 8), dtype=np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63)))
