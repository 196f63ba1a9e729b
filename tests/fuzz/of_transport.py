"""Targets of the transport: messages, headers, seals, hellos, identities.

Law: the peer here holds a good certificate, and in the targets that say so the keys as well.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from agents.api import CONTROL_SCHEMA
from migrate.messages import MESSAGES
from tests.fuzz.drawing import Draw
from tests.fuzz.hostile import example
from tests.fuzz.target import Target, law
from transport import limits
from transport.errors import BadMessage, BadSeal, FrameTooLarge, PeerGone, PeerMisbehaved, UntrustedPeer
from transport.frames import HEADER_BYTES, TAG_BYTES, Header, Kind, pack_header, parse_header
from transport.hello import CHALLENGE_BYTES, HELLO_BYTES, answer_hello, client_tag, say_hello, server_proof
from transport.schema import Schema
from transport.seal import Keys, Opener, Sealer
from transport.tls import identity_in

__all__ = ["TARGETS"]

VECTORS: Final = {
    name: bytes.fromhex(value)
    for name, value in json.loads(
        (Path(__file__).parents[1] / "vectors" / "transport_v1.json").read_text()
    ).items()
}
KEYS: Final = Keys(VECTORS["secret"])
SESSION_ID: Final = VECTORS["hello"][8:24]
MIGRATION_SCHEMA: Final = Schema(*MESSAGES)


# --- control messages ---------------------------------------------------------------------------------------


def _schema_target(name: str, schema: Schema) -> Target:
    def fuzz(data: bytes) -> None:
        message = schema.decode(data)
        law(schema.decode(schema.encode(message)) == message, "what was decoded is not decoded again")

    return Target(
        name=name,
        law="a message, or BadMessage; encoded again it is the same message",
        fuzz=fuzz,
        allowed=(BadMessage, FrameTooLarge),
        seeds=lambda: tuple(schema.encode(example(kind)) for kind in schema.message_types),
        most_input_bytes=16 << 10,
        most_allocated_bytes=4 << 20,
    )


# --- records ------------------------------------------------------------------------------------------------


def _fuzz_header(data: bytes) -> None:
    draw = Draw(data)
    expect, most_bytes = draw.pick(list(Kind)), draw.pick((8, limits.MAX_PAYLOAD_BYTES))
    raw = draw.rest()
    header = parse_header(raw, expect=expect, max_payload_bytes=most_bytes)
    law(pack_header(header) == raw, "a header is not packed as it was parsed")
    law(header.kind is expect and 0 < header.payload_bytes <= most_bytes, "a header beyond its limits")


def _header_seeds() -> tuple[bytes, ...]:
    data, ack = (VECTORS[name][:HEADER_BYTES] for name in ("data_record", "ack_record"))
    return b"\0\1" + data, b"\1\0" + ack


def _fuzz_seal(data: bytes) -> None:
    """Flip what was sealed: sequence number, header, ciphertext."""
    draw = Draw(data)
    kind, seq, slot = (
        draw.pick(list(Kind)),
        draw.byte() << 8 | draw.byte(),
        draw.byte() % limits.MAX_CONNECTIONS,
    )
    payload = draw.sized() or b"one"
    header = pack_header(Header(kind=kind, slot=slot, payload_bytes=len(payload), seq=seq))
    sealed = bytearray(len(payload) + TAG_BYTES)
    Sealer(KEYS, kind).seal_into(seq, header, payload, memoryview(sealed))
    wire, other_seq, other_kind = bytearray(header + sealed), seq, kind
    for _ in range(draw.byte() % 4):
        match draw.byte() % 4:
            case 0:
                wire[draw.byte() * len(wire) >> 8] ^= draw.byte()
            case 1:
                other_seq = draw.number() % limits.MAX_RECORDS
            case 2:
                other_kind = draw.pick(list(Kind))
            case _:
                del wire[HEADER_BYTES + draw.byte() :]
    out = bytearray(max(len(wire) - HEADER_BYTES - TAG_BYTES, 0))
    Opener(KEYS, other_kind).open_into(
        other_seq, bytes(wire[:HEADER_BYTES]), bytes(wire[HEADER_BYTES:]), memoryview(out)
    )
    unchanged = (bytes(wire), other_seq, other_kind) == (header + sealed, seq, kind)
    law(unchanged and out == payload, "a record opened that nobody has sealed")


def _seal_seeds() -> tuple[bytes, ...]:
    honest = b"\0\1\2\3" + len(VECTORS["payload"]).to_bytes(2, "big") + VECTORS["payload"]
    return honest + b"\0", honest + b"\1\0\0\1", honest + b"\1\1\3", honest + b"\1\2\1", honest + b"\1\3\5"


# --- hellos -------------------------------------------------------------------------------------------------


class _ScriptedSocket:
    """A socket whose other end answers what it is sent at once; then it hangs up."""

    def __init__(self, first: bytes, answer: Callable[[bytes], bytes]) -> None:
        self._incoming = bytearray(first)
        self._answer = answer
        self.sent = bytearray()

    def settimeout(self, seconds: float | None) -> None:
        pass

    def sendall(self, data: bytes) -> None:
        self.sent += data
        self._incoming += self._answer(data)

    def recv(self, most_bytes: int) -> bytes:
        piece = bytes(self._incoming[: min(most_bytes, 7)])
        del self._incoming[: len(piece)]
        return piece

    @property
    def as_socket(self) -> socket.socket:
        return cast(socket.socket, self)


def _fuzz_hello_server(data: bytes) -> None:
    """A client that may know the key (an odd first byte) and says whatever it likes."""
    draw = Draw(data)
    knows_key, said = draw.flag(), draw.rest()
    fields = said[: HELLO_BYTES - 32]

    def answer(challenge: bytes) -> bytes:
        if len(challenge) != CHALLENGE_BYTES:
            return b""
        return fields + client_tag(KEYS.hello, challenge, fields) if knows_key else said

    client = _ScriptedSocket(b"", answer)
    hello = answer_hello(client.as_socket, {SESSION_ID: KEYS.hello}.get)
    law(knows_key, "a client without the key was let in")
    law(hello.session_id == SESSION_ID == fields[8:24], "a client was let into another session")
    law(0 <= hello.slot < limits.MAX_CONNECTIONS, "a slot that no migration has")
    law(len(client.sent) == CHALLENGE_BYTES + 32, "the server said more than its proof")


def _fuzz_hello_client(data: bytes) -> None:
    """A server that proves the key, reflects what it hears, or says whatever it likes."""
    draw = Draw(data)
    how, slot, challenge = draw.byte() % 3, draw.byte() % limits.MAX_CONNECTIONS, draw.take(CHALLENGE_BYTES)
    noise = draw.rest()

    def answer(hello: bytes) -> bytes:
        return (server_proof(KEYS.hello, challenge, hello), hello[-32:], noise)[how]

    say_hello(_ScriptedSocket(challenge, answer).as_socket, SESSION_ID, slot, KEYS.hello)
    law(how == 0, "a server without the key was believed")


# --- certificates -------------------------------------------------------------------------------------------


def _fuzz_identity(data: bytes) -> None:
    names = []
    for line in data.split(b"\n"):
        kind, _, value = line.decode("utf-8", "replace").partition(" ")
        names.append((kind, value))
    identity = identity_in({"subjectAltName": tuple(names)})
    law(("URI", identity.uri) in names, "an identity that does not stand in the certificate")
    law(len(identity.name) <= 63 and identity.name.isascii(), "a name that is no name")


TARGETS: Final = (
    _schema_target("control-message", CONTROL_SCHEMA),
    _schema_target("migration-message", MIGRATION_SCHEMA),
    Target(
        name="record-header",
        law="a header within its limits, packed again to the same bytes",
        fuzz=_fuzz_header,
        allowed=(PeerMisbehaved,),
        seeds=_header_seeds,
        most_input_bytes=64,
        most_allocated_bytes=1 << 20,
    ),
    Target(
        name="record-seal",
        law="nothing opens but what was sealed, under its number and direction",
        fuzz=_fuzz_seal,
        allowed=(BadSeal,),
        seeds=_seal_seeds,
    ),
    Target(
        name="hello-server",
        law="only who has the key gets in, and only to its own session",
        fuzz=_fuzz_hello_server,
        allowed=(PeerMisbehaved, PeerGone),
        seeds=lambda: (b"\1" + VECTORS["hello"][:40], b"\0" + VECTORS["hello"]),
        most_input_bytes=256,
    ),
    Target(
        name="hello-client",
        law="only who has the key is believed",
        fuzz=_fuzz_hello_client,
        allowed=(PeerMisbehaved, PeerGone),
        seeds=lambda: tuple(bytes([how, 1]) + VECTORS["challenge"] + bytes(32) for how in range(3)),
        most_input_bytes=256,
    ),
    Target(
        name="certificate-identity",
        law="one identity, exactly as it stands in the certificate, or UntrustedPeer",
        fuzz=_fuzz_identity,
        allowed=(UntrustedPeer,),
        seeds=lambda: (b"URI vmferry://agent/host-a\nDNS host-a", b"URI vmferry://operator/x"),
    ),
)
