from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import units
from agents.errors import QuantityInvalid
from agents.units import (
    approx_duration,
    approx_rate,
    approx_size,
    format_cap,
    format_duration,
    format_rate,
    format_size,
    parse_cap,
    parse_duration,
    parse_rate,
    parse_size,
)

quick = settings(deadline=None, max_examples=100)
amounts = st.integers(0, units.MAX_BYTES) | st.builds(
    lambda count, factor: count * factor, st.integers(0, 999), st.sampled_from([1, 1 << 20, 10**9, 1 << 40])
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4MiB", 4 << 20),
        ("4 MiB", 4 << 20),
        ("4M", 4 << 20),
        ("4k", 4096),
        ("1GB", 10**9),
        ("1.5GiB", 3 << 29),
        ("1KB", 1000),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_a_size_is_read_as_virsh_reads_it(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("100MB/s", 100_000_000),
        ("90MiB/s", 90 << 20),
        ("90M/s", 90 << 20),
        ("1Gbit/s", 125_000_000),
        ("2.5Gbit/s", 312_500_000),
        ("10Gbps", 1_250_000_000),
        ("8bit/s", 1),
        ("9bps", 1),
        ("100", 100 << 20),
        ("500B/s", 500),
    ],
)
def test_a_rate_counts_bytes_or_bits_as_its_unit_says(text: str, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("300ms", 0.3),
        ("10s", 10.0),
        ("5m", 300.0),
        ("5min", 300.0),
        ("1.5h", 5400.0),
        ("0", 0.0),
        ("7us", 7e-6),
    ],
)
def test_a_duration_is_read_in_seconds(text: str, duration_s: float) -> None:
    assert parse_duration(text) == duration_s


@pytest.mark.parametrize("text", ["0", "0B/s", "0Gbit/s", "0.0"])
def test_a_cap_of_zero_is_no_cap(text: str) -> None:
    assert parse_cap(text) is None


@pytest.mark.parametrize("parse", [parse_size, parse_rate, parse_duration, parse_cap])
@pytest.mark.parametrize(
    "text", ["", "-1", "1e9", "MiB", "4 Mi B", "4XB", "4mb", "٤MiB", "1/s", "nan", "9" * 21]
)
def test_what_is_no_quantity_is_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(QuantityInvalid):
        parse(text)


def test_one_byte_beyond_the_largest_file_is_refused() -> None:
    with pytest.raises(QuantityInvalid, match="more than"):
        parse_size(str(2**63))


def test_a_fraction_of_a_byte_is_refused() -> None:
    with pytest.raises(QuantityInvalid, match="whole number"):
        parse_size("1.5")


def test_a_duration_without_a_unit_is_refused_with_both_readings() -> None:
    with pytest.raises(QuantityInvalid, match="300ms or 300s"):
        parse_duration("300")


def test_ten_years_are_the_longest_duration() -> None:
    assert parse_duration("3650d") == units.MAX_DURATION_S
    with pytest.raises(QuantityInvalid, match="ten years"):
        parse_duration("3650.1d")


def test_a_rate_is_not_a_size() -> None:
    with pytest.raises(QuantityInvalid):
        parse_size("100MB/s")
    with pytest.raises(QuantityInvalid):
        parse_rate("100MB")


@quick
@given(amounts)
def test_sizes_come_back_exactly(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@quick
@given(amounts)
def test_rates_come_back_exactly(bytes_per_s: int) -> None:
    assert parse_rate(format_rate(bytes_per_s)) == bytes_per_s


@quick
@given(st.none() | st.integers(1, units.MAX_BYTES))
def test_caps_come_back_exactly(cap_bytes_per_s: int | None) -> None:
    assert parse_cap(format_cap(cap_bytes_per_s)) == cap_bytes_per_s


@quick
@given(st.integers(0, units.MAX_DURATION_S * 10**6))
def test_durations_come_back_to_the_microsecond(duration_us: int) -> None:
    assert parse_duration(format_duration(duration_us / 10**6)) == duration_us / 10**6


@quick
@given(st.text(max_size=30))
def test_garbage_raises_only_quantity_invalid(text: str) -> None:
    for parse in (parse_size, parse_rate, parse_duration):
        try:
            parse(text)
        except QuantityInvalid:
            continue


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1 << 20, "1.00 MiB"),
        (536_870_912, "512 MiB"),
        (1.5 * 2**30, "1.50 GiB"),
    ],
)
def test_sizes_are_shown_in_three_figures(size_bytes: float, text: str) -> None:
    assert approx_size(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0.00 ms"),
        (0.00631, "6.31 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1.00 s"),
        (12.44, "12.4 s"),
        (99.96, "1m40s"),
        (302, "5m02s"),
        (7500, "2h05m"),
        (5e-6, "5.00 us"),
    ],
)
def test_durations_are_shown_in_the_unit_that_fits(duration_s: float, text: str) -> None:
    assert approx_duration(duration_s) == text


def test_rates_are_shown_in_thousands() -> None:
    assert approx_rate(118_000_000) == "118 MB/s"
