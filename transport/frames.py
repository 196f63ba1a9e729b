"""The header of a sealed record: 16 bytes, big endian, in clear, and bound to the record as associated data.

```
 0       1       2               4               8                               16
 +-------+-------+---------------+---------------+-------------------------------+------------------+-----+
 | magic | kind  | slot          | length        | seq                           | length bytes     | tag |
 | 0xF1  | u8    | u16           | u32           | u64                           | of ciphertext    | 16  |
 +-------+-------+---------------+---------------+-------------------------------+------------------+-----+
```

`magic` is 0xF0 | format version. `slot` names the connection that the record was sealed for: a record that is
sent again on another connection keeps it, for the ciphertext and its header never change. `length` counts the
plaintext; the ciphertext has the same length.
Law: pure; nothing here knows a key or a socket.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from transport import limits
from transport.errors import FrameTooLarge, LocalMisuse, PeerMisbehaved

__all__ = ["HEADER_BYTES", "MAGIC", "TAG_BYTES", "Header", "Kind", "pack_header", "parse_header"]

MAGIC: Final = 0xF1
TAG_BYTES: Final = 16

_HEADER: Final = struct.Struct("!BBHIQ")
HEADER_BYTES: Final = _HEADER.size


class Kind(enum.IntEnum):
    """What a record carries; the values are on the wire."""

    DATA = 1  # source to destination: one payload
    ACK = 2  # destination to source: the seq of one DATA record that was applied (u64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header that was parsed, and is not yet authenticated."""

    kind: Kind
    slot: int
    payload_bytes: int
    seq: int


def pack_header(header: Header) -> bytes:
    """Give the 16 bytes of a header.

    Raises:
        LocalMisuse: a number does not fit its field or its limit.
    """
    if not (
        0 <= header.slot < limits.MAX_CONNECTIONS
        and 0 < header.payload_bytes <= limits.MAX_PAYLOAD_BYTES
        and 0 <= header.seq < limits.MAX_RECORDS
    ):
        raise LocalMisuse(f"no such record can be sent: {header}")
    return _HEADER.pack(MAGIC, header.kind, header.slot, header.payload_bytes, header.seq)


def parse_header(data: bytes | bytearray | memoryview, *, expect: Kind, max_payload_bytes: int) -> Header:
    """Read a header of the one kind that may come here.

    Raises:
        PeerMisbehaved: it is none; FrameTooLarge when it announces more than `max_payload_bytes`.
    """
    if len(data) != HEADER_BYTES:
        raise PeerMisbehaved(f"a record header has {HEADER_BYTES} bytes, not {len(data)}")
    magic, kind, slot, payload_bytes, seq = _HEADER.unpack(data)
    if magic != MAGIC:
        raise PeerMisbehaved(f"a record begins with 0x{magic:02x} instead of 0x{MAGIC:02x}")
    if kind != expect:
        raise PeerMisbehaved(f"a record of kind {kind} where only {expect.name} may come")
    if payload_bytes > max_payload_bytes:
        raise FrameTooLarge(payload_bytes, max_payload_bytes)
    if payload_bytes == 0:
        raise PeerMisbehaved("an empty record")
    if slot >= limits.MAX_CONNECTIONS:
        raise PeerMisbehaved(f"slot {slot} of a migration with at most {limits.MAX_CONNECTIONS}")
    if seq >= limits.MAX_RECORDS:
        raise PeerMisbehaved(f"record number {seq} is beyond the last, {limits.MAX_RECORDS - 1}")
    return Header(kind=expect, slot=slot, payload_bytes=payload_bytes, seq=seq)
