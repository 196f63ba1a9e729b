"""Sizes, rates and durations as people write them, for configuration files and command-line options.

Law: pure; no file, no clock. Each `parse_X` has a `format_X` with `parse_X(format_X(n)) == n`, exactly.
`approx_X` is for reading only: three figures, never parsed again.

How virsh's habits are kept, and where they are not:

* sizes: `4MiB` is 1024 based and `4MB` 1000 based, and `4M` is `4MiB`, as in virsh; a plain number is bytes.
* rates: `100MB/s` counts bytes, `1Gbit/s` (or `1Gbps`) counts bits, always 1000 based, as links are sold. A
  plain number is MiB/s, as in `virsh migrate --bandwidth` and `virsh migrate-setspeed`.
* durations always carry a unit: `virsh migrate --timeout` counts in seconds, `virsh migrate-setmaxdowntime`
  in milliseconds, so a plain number would be wrong for one of the two. Only `0` needs none.
"""

from __future__ import annotations

import re
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from agents.errors import QuantityInvalid

__all__ = [
    "approx_duration",
    "approx_rate",
    "approx_size",
    "format_cap",
    "format_duration",
    "format_rate",
    "format_size",
    "parse_cap",
    "parse_duration",
    "parse_rate",
    "parse_size",
]

# Nothing that is written here is larger than the largest file offset; more is a slip of the hand.
MAX_BYTES: Final = 2**63 - 1
# Ten years: no wait of an agent is longer, and it is far from where float seconds lose microseconds.
MAX_DURATION_S: Final = 10 * 365 * 86400

_BINARY: Final = MappingProxyType({"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40})
_DECIMAL: Final = MappingProxyType({"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12})
_BITS: Final = MappingProxyType({"kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9, "Tbit": 10**12})
_SIZE_UNITS: Final = MappingProxyType(
    {"": 1, "B": 1, **_BINARY, **_DECIMAL, "KB": 10**3}
    | {name[0]: factor for name, factor in _BINARY.items()}
    | {"k": 1 << 10}
)
_DURATION_UNITS_US: Final = MappingProxyType(
    {
        "us": 1,
        "ms": 10**3,
        "s": 10**6,
        "m": 60 * 10**6,
        "min": 60 * 10**6,
        "h": 3600 * 10**6,
        "d": 86400 * 10**6,
    }
)
# At most 20 digits: a quantity is short, and Decimal must not be fed a megabyte of them.
_QUANTITY: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?)\s?([A-Za-z]*(?:/s)?)", re.ASCII)

_SIZE_EXAMPLES: Final = "a size looks like 4MiB, 1.5GB or 4096 (bytes)"
_RATE_EXAMPLES: Final = "a rate looks like 100MB/s, 90MiB/s, 1Gbit/s or 100 (MiB/s)"
_DURATION_EXAMPLES: Final = "a duration looks like 300ms, 10s, 5m or 1h"


def parse_size(text: str) -> int:
    """Give the bytes that `text` stands for.

    Raises:
        QuantityInvalid: not a size, not a whole number of bytes, or larger than any file can be.
    """
    number, unit = _split(text, _SIZE_EXAMPLES)
    factor = _SIZE_UNITS.get(unit)
    if factor is None:
        raise QuantityInvalid(f"{text!r} has no unit of sizes that is known here: {_SIZE_EXAMPLES}")
    return _whole_bytes(text, number * factor)


def format_size(size_bytes: int) -> str:
    """Write a size so that `parse_size` gives the same bytes: the largest unit that divides it."""
    for units in (_BINARY, _DECIMAL):
        for name, factor in reversed(list(units.items())):
            if size_bytes >= factor and size_bytes % factor == 0:
                return f"{size_bytes // factor}{name}"
    return f"{size_bytes}B"


def parse_rate(text: str) -> int:
    """Give the bytes per second that `text` stands for; a rate in bits is rounded down to whole bytes.

    Raises:
        QuantityInvalid: not a rate.
    """
    number, unit = _split(text, _RATE_EXAMPLES)
    if unit == "":
        return _whole_bytes(text, number * (1 << 20))
    if unit.endswith("bps"):
        unit = unit.removesuffix("bps") + "bit/s"
    per_second = unit.removesuffix("/s")
    if per_second != unit:
        if per_second == "bit" or per_second in _BITS:
            return _whole_bytes(text, number * _BITS.get(per_second, 1) // 8)
        if per_second in _SIZE_UNITS and per_second != "":
            return _whole_bytes(text, number * _SIZE_UNITS[per_second])
    raise QuantityInvalid(f"{text!r} has no unit of rates that is known here: {_RATE_EXAMPLES}")


def format_rate(bytes_per_s: int) -> str:
    """Write a rate so that `parse_rate` gives the same bytes per second."""
    return format_size(bytes_per_s) + "/s"


def parse_cap(text: str) -> int | None:
    """Give a cap in bytes per second, or None where `text` is a rate of zero: no cap.

    Raises:
        QuantityInvalid: not a rate.
    """
    return parse_rate(text) or None


def format_cap(cap_bytes_per_s: int | None) -> str:
    """Write a cap so that `parse_cap` gives the same; no cap is `0`."""
    return format_rate(cap_bytes_per_s) if cap_bytes_per_s else "0"


def parse_duration(text: str) -> float:
    """Give the seconds that `text` stands for, in whole microseconds.

    Raises:
        QuantityInvalid: not a duration, without a unit, or longer than ten years.
    """
    number, unit = _split(text, _DURATION_EXAMPLES)
    if unit == "":
        if number == 0:
            return 0.0
        raise QuantityInvalid(f"{text!r} has no unit; write {text.strip()}ms or {text.strip()}s")
    factor_us = _DURATION_UNITS_US.get(unit)
    if factor_us is None:
        raise QuantityInvalid(f"{text!r} has no unit of time that is known here: {_DURATION_EXAMPLES}")
    duration_us = round(number * factor_us)
    if duration_us > MAX_DURATION_S * 10**6:
        raise QuantityInvalid(f"{text!r} is longer than ten years")
    return duration_us / 10**6


def format_duration(duration_s: float) -> str:
    """Write a duration so that `parse_duration` gives the same, to the microsecond."""
    duration_us = round(duration_s * 10**6)
    if duration_us == 0:
        return "0s"
    for name in ("h", "m", "s", "ms"):
        if duration_us % _DURATION_UNITS_US[name] == 0:
            return f"{duration_us // _DURATION_UNITS_US[name]}{name}"
    return f"{duration_us}us"


def approx_size(size_bytes: float) -> str:
    """Write a size for reading, in 1024 based units: `512 MiB`."""
    return _approx(size_bytes, _BINARY, "B")


def approx_rate(bytes_per_s: float) -> str:
    """Write a rate for reading, in 1000 based units of bytes: `118 MB/s`."""
    return _approx(bytes_per_s, _DECIMAL, "B") + "/s"


def approx_duration(duration_s: float) -> str:
    """Write a duration for reading: `6.31 ms`, `12.4 s`, `5m02s`, `2h05m`."""
    if duration_s >= 3599.5:
        minutes = round(duration_s / 60)
        return f"{minutes // 60}h{minutes % 60:02d}m"
    if duration_s >= 99.95:
        seconds = round(duration_s)
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if duration_s >= 0.9995:
        return f"{_three_figures(duration_s)} s"
    if duration_s >= 0.9995e-3 or duration_s == 0:
        return f"{_three_figures(duration_s * 1e3)} ms"
    return f"{_three_figures(duration_s * 1e6)} us"


def _split(text: str, examples: str) -> tuple[Decimal, str]:
    found = _QUANTITY.fullmatch(text.strip())
    if found is None:
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise QuantityInvalid(f"{shown!r} cannot be read: {examples}")
    return Decimal(found[1]), found[2]


def _whole_bytes(text: str, size_bytes: Decimal) -> int:
    if size_bytes != size_bytes.to_integral_value():
        raise QuantityInvalid(f"{text!r} is not a whole number of bytes")
    if size_bytes > MAX_BYTES:
        raise QuantityInvalid(f"{text!r} is more than {MAX_BYTES} bytes")
    return int(size_bytes)


def _approx(value: float, units: MappingProxyType[str, int], smallest: str) -> str:
    for name, factor in reversed(list(units.items())):
        # Half a unit of the third figure below the factor already rounds up to it.
        if value >= factor * 0.9995:
            return f"{_three_figures(value / factor)} {name}"
    return f"{value:.0f} {smallest}"


def _three_figures(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}"
