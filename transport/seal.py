"""Sealing of records: AES-256-GCM, keys from one secret, a counter for a nonce.

```
 migration secret, 32 random bytes, made at the source, sent inside the TLS 1.3 control session
   └─ HKDF-SHA256(salt = "vmferry transport v1", info = ...)
        ├─ "data" | u64 epoch   ->  AES-256 key of records source -> destination with seq // 2^18 == epoch
        ├─ "ack"  | u64 epoch   ->  AES-256 key of records destination -> source
        └─ "hello"              ->  HMAC-SHA256 key of the data connections' handshake

 nonce, 12 bytes  =  "data" or "ack " (4)  |  seq (8)         associated data  =  the record's header (16)
```

Law: **one (key, nonce) pair seals one plaintext.** By construction: a secret belongs to one migration and to
one Sealer per direction; a Sealer refuses a seq that it has sealed before, whatever its caller does, and a
record that must be sent again is sent as the ciphertext that it is. There is no call that seals twice.
Keys change every `limits.RECORDS_PER_KEY` records without a message: both sides compute the epoch from the seq.
Pure but for the CPU; sealing and opening release the GIL and may run in several threads at once.
Source: NIST SP 800-38D (GCM), RFC 5869 (HKDF).
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from transport import limits
from transport.errors import BadSeal, LocalMisuse
from transport.frames import TAG_BYTES, Kind

__all__ = ["SECRET_BYTES", "Keys", "Opener", "Sealer"]

SECRET_BYTES: Final = 32

_SALT: Final = b"vmferry transport v1"
_LABELS: Final = {Kind.DATA: b"data", Kind.ACK: b"ack "}
_U64: Final = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one migration, all from one secret of 32 random bytes.

    Raises:
        LocalMisuse: the secret does not have 32 bytes.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise LocalMisuse(f"a migration secret has {SECRET_BYTES} bytes, not {len(self.secret)}")

    @property
    def hello(self) -> bytes:
        """Key of the handshake that opens a data connection."""
        return self._derive(b"hello")

    def record_key(self, kind: Kind, epoch: int) -> bytes:
        """Key of the records of one direction with seq // RECORDS_PER_KEY == epoch."""
        return self._derive(_LABELS[kind] + _U64.pack(epoch))

    def _derive(self, info: bytes) -> bytes:
        return HKDF(algorithm=hashes.SHA256(), length=32, salt=_SALT, info=info).derive(self.secret)


class _RecordKeys:
    """AES-GCM of the epochs in use: the newest and the one before, for records that are still under way."""

    def __init__(self, keys: Keys, kind: Kind) -> None:
        self._keys = keys
        self._kind = kind
        self._lock = threading.Lock()
        self._by_epoch: dict[int, AESGCM] = {}

    def aead(self, seq: int) -> AESGCM:
        epoch = seq // limits.RECORDS_PER_KEY
        # Reading a dict needs no lock, and all records but the first of an epoch end here.
        known = self._by_epoch.get(epoch)
        if known is not None:
            return known
        with self._lock:
            made = AESGCM(self._keys.record_key(self._kind, epoch))
            if len(self._by_epoch) >= 2:
                del self._by_epoch[min(self._by_epoch)]
            self._by_epoch[epoch] = made
            return made

    def nonce(self, seq: int) -> bytes:
        return _LABELS[self._kind] + _U64.pack(seq)


class Sealer:
    """Seals the records of one direction of one migration, each seq once. Thread-safe."""

    def __init__(self, keys: Keys, kind: Kind) -> None:
        self._record_keys = _RecordKeys(keys, kind)
        self._lock = threading.Lock()
        # Every seq below the floor is used, and those in the set: workers finish out of order by a few.
        self._floor = 0
        self._used_above: set[int] = set()

    def seal_into(self, seq: int, header: bytes, payload: bytes | memoryview, out: memoryview) -> int:
        """Seal one payload; `out` gets ciphertext and tag and must have exactly their length.

        Raises:
            LocalMisuse: this seq was sealed before, or is beyond the last.
        """
        self._use_up(seq)
        return self._record_keys.aead(seq).encrypt_into(self._record_keys.nonce(seq), payload, header, out)

    def _use_up(self, seq: int) -> None:
        if not 0 <= seq < limits.MAX_RECORDS:
            raise LocalMisuse(f"record number {seq} does not exist; a migration has {limits.MAX_RECORDS}")
        with self._lock:
            if seq < self._floor or seq in self._used_above:
                raise LocalMisuse(f"record {seq} was sealed before: its nonce is used up")
            if seq - self._floor >= limits.span_records(limits.MAX_WINDOW_BYTES):
                raise LocalMisuse(f"record {seq} is sealed too far ahead of record {self._floor}")
            self._used_above.add(seq)
            while self._floor in self._used_above:
                self._used_above.remove(self._floor)
                self._floor += 1


class Opener:
    """Opens the records of one direction of one migration. Thread-safe; knows no order and no repetition."""

    def __init__(self, keys: Keys, kind: Kind) -> None:
        self._record_keys = _RecordKeys(keys, kind)

    def open_into(
        self,
        seq: int,
        header: bytes | bytearray | memoryview,
        sealed: bytes | memoryview,
        out: memoryview,
    ) -> int:
        """Open one record; `out` must have exactly the plaintext's length, and is garbage after an error.

        Raises:
            BadSeal: header, seq or ciphertext are not what was sealed (the peer's fault, or the path's).
        """
        if len(sealed) < TAG_BYTES:
            raise BadSeal(seq)
        try:
            return self._record_keys.aead(seq).decrypt_into(self._record_keys.nonce(seq), sealed, header, out)
        except InvalidTag as exc:
            raise BadSeal(seq) from exc
