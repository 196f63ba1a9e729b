"""Golden bytes of keys, records, acknowledgements and the hello, against a construction of their own.

`make_vectors` uses nothing of the transport package: HKDF and HMAC by hand, AES-GCM in one call. A change of the
wire format shows here first. `python -m tests.transport.test_vectors` writes the file again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from transport import hello, limits
from transport.frames import HEADER_BYTES, TAG_BYTES, Header, Kind, pack_header, parse_header
from transport.seal import Keys, Opener, Sealer

FILE = Path(__file__).parent.parent / "vectors" / "transport_v1.json"

SECRET = bytes(range(32))
SESSION_ID = bytes(range(100, 116))
CHALLENGE = bytes(range(16))
CLIENT_NONCE = bytes(range(50, 66))
PAYLOAD = b"opaque to the transport"
DATA_SEQ, DATA_SLOT = 258, 1
ACK_SEQ = 3
SECOND_EPOCH_SEQ = limits.RECORDS_PER_KEY


def hkdf(info: bytes) -> bytes:
    """RFC 5869 for one block of SHA-256."""
    extracted = hmac.digest(b"vmferry transport v1", SECRET, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def record(key: bytes, label: bytes, kind: int, slot: int, seq: int, payload: bytes) -> bytes:
    header = struct.pack("!BBHIQ", 0xF1, kind, slot, len(payload), seq)
    return header + AESGCM(key).encrypt(label + struct.pack("!Q", seq), payload, header)


def by_hand_hmac(key: bytes, message: bytes) -> bytes:
    """RFC 2104, for a key shorter than a block."""
    padded = key.ljust(64, b"\x00")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).digest()


def make_vectors() -> dict[str, str]:
    data_0, data_1 = (hkdf(b"data" + struct.pack("!Q", epoch)) for epoch in (0, 1))
    ack_0 = hkdf(b"ack " + struct.pack("!Q", 0))
    hello_key = hkdf(b"hello")
    fields = b"VMFD" + bytes([1, 0]) + struct.pack("!H", DATA_SLOT) + SESSION_ID + CLIENT_NONCE
    said = fields + by_hand_hmac(hello_key, b"client" + CHALLENGE + fields)
    vectors = {
        "secret": SECRET,
        "hello_key": hello_key,
        "data_key_epoch_0": data_0,
        "data_key_epoch_1": data_1,
        "ack_key_epoch_0": ack_0,
        "payload": PAYLOAD,
        "data_record": record(data_0, b"data", 1, DATA_SLOT, DATA_SEQ, PAYLOAD),
        "data_record_of_second_epoch": record(data_1, b"data", 1, DATA_SLOT, SECOND_EPOCH_SEQ, PAYLOAD),
        "ack_record": record(ack_0, b"ack ", 2, DATA_SLOT, ACK_SEQ, struct.pack("!Q", DATA_SEQ)),
        "challenge": CHALLENGE,
        "hello": said,
        "hello_proof": by_hand_hmac(hello_key, b"server" + CHALLENGE + said),
    }
    return {name: value.hex() for name, value in vectors.items()}


def golden() -> dict[str, bytes]:
    return {name: bytes.fromhex(value) for name, value in json.loads(FILE.read_text()).items()}


def test_the_file_is_what_the_independent_construction_makes() -> None:
    assert json.loads(FILE.read_text()) == make_vectors()


def test_keys_are_as_they_were() -> None:
    keys, known = Keys(SECRET), golden()
    assert keys.hello == known["hello_key"]
    assert keys.record_key(Kind.DATA, 0) == known["data_key_epoch_0"]
    assert keys.record_key(Kind.DATA, 1) == known["data_key_epoch_1"]
    assert keys.record_key(Kind.ACK, 0) == known["ack_key_epoch_0"]


def test_records_and_acknowledgements_seal_and_open_as_they_did() -> None:
    for name, kind, seq, payload in (
        ("data_record", Kind.DATA, DATA_SEQ, PAYLOAD),
        ("ack_record", Kind.ACK, ACK_SEQ, struct.pack("!Q", DATA_SEQ)),
    ):
        header = pack_header(Header(kind=kind, slot=DATA_SLOT, payload_bytes=len(payload), seq=seq))
        out = bytearray(len(payload) + TAG_BYTES)
        Sealer(Keys(SECRET), kind).seal_into(seq, header, payload, memoryview(out))
        assert header + out == golden()[name]


def test_a_record_of_the_second_epoch_opens() -> None:
    data = golden()["data_record_of_second_epoch"]
    header = parse_header(data[:HEADER_BYTES], expect=Kind.DATA, max_payload_bytes=100)
    assert header.seq == SECOND_EPOCH_SEQ
    out = bytearray(header.payload_bytes)
    Opener(Keys(SECRET), Kind.DATA).open_into(
        header.seq, data[:HEADER_BYTES], data[HEADER_BYTES:], memoryview(out)
    )
    assert out == PAYLOAD


def test_the_hello_and_its_proof_are_as_they_were() -> None:
    known = golden()
    said = known["hello"]
    assert len(said) == hello.HELLO_BYTES
    fields, tag = said[: -hello.PROOF_BYTES], said[-hello.PROOF_BYTES :]
    assert hello.client_tag(known["hello_key"], CHALLENGE, fields) == tag
    assert hello.server_proof(known["hello_key"], CHALLENGE, said) == known["hello_proof"]


if __name__ == "__main__":
    FILE.write_text(json.dumps(make_vectors(), indent=2) + "\n")
