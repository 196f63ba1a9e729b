from __future__ import annotations

from memory.errors import CodecError, OutOfRam, RamError, RamGone, TrackerError, TrackerLost


def test_out_of_ram_says_how_much_where_and_what_to_do() -> None:
    error = OutOfRam(first_gfn=7, wanted_bytes=8192)
    assert (error.first_gfn, error.wanted_bytes) == (7, 8192)
    assert "8192 bytes" in str(error)
    assert "page 7" in str(error)
    assert "another host" in str(error)


def test_a_cut_file_says_where_it_ends() -> None:
    assert "page 9" in str(RamGone(first_gfn=9))


def test_every_error_is_a_ram_error_and_a_lost_log_is_a_tracker_error() -> None:
    assert issubclass(TrackerLost, TrackerError)
    for kind in (CodecError, OutOfRam, RamGone, TrackerError):
        assert issubclass(kind, RamError)
        assert not issubclass(kind, MemoryError)
