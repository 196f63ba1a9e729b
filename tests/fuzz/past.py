"""Inputs that broke a target's law once: the suite feeds each again.

Law: one line of why for each. A new finding comes here in the commit that mends it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

__all__ = ["PAST"]

# Past Python's own limit of digits, whose error is not the TOML reader's.
_DIGITS: Final = b"9" * 5000

PAST: Final = MappingProxyType(
    {
        # A read allocated the limit of 16 MiB, whatever was in the file.
        "journal": (b"x",),
        # A number of thousands of digits was a bare ValueError.
        "config": (b"\1a = " + _DIGITS, b"\0a = " + _DIGITS),
        "qemu-toml": (b"vcpus = " + _DIGITS,),
        # The same, and brackets in brackets were a RecursionError.
        "embedded-toml": (b"seed = " + _DIGITS, b"seed = " + b"[" * 5000),
        # The kernel escapes the line feed alone; a name with another end of a line was read as two lines.
        "proc-maps": (b"a\r7f", b"a\x0cb", b"a\xc2\x85b", b"a\xe2\x80\xa8b"),
        # A drive whose -blockdev does not say what it is was a KeyError; a count of thousands of digits a ValueError.
        "qemu-arguments": (
            b"qemu\0-blockdev\0node-name=a\0-device\0virtio-blk-pci,drive=a",
            b"qemu\0-smp\0" + _DIGITS,
        ),
        # A group named twice, and groups out of order, gave pages that were not in order.
        "compared-groups": (b"\2\2\2\3\1", b"\2\3\2\3\1"),
        # A number of microseconds beyond what a float holds was an OverflowError.
        "event-time": (b'{"timestamp": {"seconds": 1, "microseconds": ' + b"9" * 400 + b"}}",),
    }
)
