"""Ownership records in etcd: one key a generation, made by a transaction that compares first.

Law: a record is made only in the etcd that its place names, only where the record before it stands, and only if nobody
has made it. All of it is in one transaction, which etcd does whole or not at all; asked twice, it changes nothing, so
that a lost answer is answered by asking again. Everything that is read is read linearizably.

    PREFIX/identity                      made once, at random: tells this etcd from every other
    PREFIX/records/GUEST.000000000007    as `migrate.ownership.format_record` writes it; the newest counts
    PREFIX/probe/RANDOM                  a nonce of a preflight, written at one end and read at the other
    PREFIX/trial/GUEST                   whether something can be written; nothing decides by it

A place is `etcd:PREFIX#IDENTITY`: a host that reaches another etcd, or has other keys there, refuses it.

Source: https://etcd.io/docs/v3.4/learning/api/ ("Transaction"); a missing key compares as create_revision 0.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from typing import Final

from agents.ownership.files import KEPT_RECORDS
from agents.ownership.gateway import Gateway
from agents.ownership.place import ETCD, EtcdPlace
from migrate.errors import NotRecorded, StorageFailed
from migrate.ownership import (
    MAX_RECORD_BYTES,
    Ownership,
    RecordInvalid,
    format_record,
    parse_record,
    record_name,
)

__all__ = ["EtcdRecords"]

IDENTITY_BYTES: Final = 16
_PROBE: Final = re.compile(r"probe/[0-9a-f]{16}", re.ASCII)


class EtcdRecords:
    """Records in one etcd. Close it with `aclose`."""

    def __init__(self, place: EtcdPlace) -> None:
        self._gateway = Gateway(place)
        self._prefix = place.prefix

    async def aclose(self) -> None:
        """Close the connections. May be called twice."""
        await self._gateway.aclose()

    async def place(self) -> str:
        """Give this etcd's place; its identity is made by who asks first. Raises StorageFailed."""
        fresh = secrets.token_hex(IDENTITY_BYTES).encode()
        key = self._key("identity")
        answer = await self._gateway.txn(
            {"compare": [_is_missing(key)], "success": [_put(key, fresh)], "failure": [_get(key)]}
        )
        identity = fresh if answer.get("succeeded") is True else _only_value(answer, 0)
        return self._place_of(identity or b"")

    async def check(self, directory: str, guest_id: str) -> str | None:
        """Say why records of a guest cannot be kept there, or None. Both are hostile."""
        try:
            record_name(guest_id, 1)
            answer = await self._gateway.txn({"success": [_get(self._key("identity"))]})
            identity = _only_value(answer, 0)
            if identity is None or self._place_of(identity) != directory:
                return f"this host reaches another etcd than {directory[:200]!r}, or has another prefix in it"
            trial = self._key(f"trial/{guest_id}")
            await self._gateway.txn({"success": [_put(trial, bytes(MAX_RECORD_BYTES))]})
            await self._gateway.txn({"success": [{"request_delete_range": {"key": _text(trial)}}]})
        except (StorageFailed, RecordInvalid) as exc:
            return str(exc)
        return None

    async def latest(self, directory: str, guest_id: str) -> Ownership | None:
        """Give the newest record. Raises StorageFailed, RecordInvalid."""
        newest = self._newest(guest_id)
        identity = self._key("identity")
        answer = await self._gateway.txn(
            {"compare": [self._is_here(directory)], "success": [newest], "failure": [_get(identity)]}
        )
        if answer.get("succeeded") is not True:
            raise StorageFailed(_elsewhere(directory))
        return _record(answer, 0, guest_id)

    async def claim(self, directory: str, wanted: Ownership) -> Ownership:
        """Create the record unless its generation is taken; give the one that stands now.

        Raises StorageFailed: nobody knows whether it was created; NotRecorded: it was not, and will not be.
        """
        name, content = record_name(wanted.guest_id, wanted.generation), format_record(wanted)
        key, identity = self._key(f"records/{name}"), self._key("identity")
        compare = [self._is_here(directory), _is_missing(key)]
        if wanted.generation == 1:
            compare.append(_is_missing(*self._range(wanted.guest_id)))
        else:
            before = record_name(wanted.guest_id, wanted.generation - 1)
            compare.append(_is_there(self._key(f"records/{before}")))
        answer = await self._gateway.txn(
            {
                "compare": compare,
                "success": [_put(key, content)],
                "failure": [self._newest(wanted.guest_id), _get(identity)],
            }
        )
        if answer.get("succeeded") is True:
            return wanted
        # Somebody was first, or we were and the answer was lost: the record tells.
        if self._place_of(_only_value(answer, 1) or b"") != directory:
            raise StorageFailed(_elsewhere(directory))
        standing = _record(answer, 0, wanted.guest_id)
        if standing is None or standing.generation < wanted.generation:
            raise NotRecorded(
                f"{directory} does not show generation {wanted.generation - 1} of the ownership record, which was "
                "made there: was it restored from an older copy?"
            )
        return standing

    async def stage_claim(self, directory: str, wanted: Ownership) -> None:
        """See that etcd answers, and have the connection that the claim takes. Raises StorageFailed, RecordInvalid."""
        record_name(wanted.guest_id, wanted.generation)
        await self.latest(directory, wanted.guest_id)

    async def unstage_claim(self, directory: str, wanted: Ownership) -> None:
        """Nothing was staged that anybody would find."""

    async def tidy(self, directory: str, guest_id: str) -> None:
        """Clear away records that are older than the newest few. Raises StorageFailed."""
        newest = await self.latest(directory, guest_id)
        if newest is None or newest.generation <= KEPT_RECORDS:
            return
        first = self._key(f"records/{record_name(guest_id, 1)}")
        kept = self._key(f"records/{record_name(guest_id, newest.generation - KEPT_RECORDS + 1)}")
        await self._gateway.txn(
            {
                "compare": [self._is_here(directory)],
                "success": [{"request_delete_range": {"key": _text(first), "range_end": _text(kept)}}],
            }
        )

    async def plant(self, nonce: bytes) -> str:
        """Write a nonce that the other host must read; give its place. Raises StorageFailed."""
        name = f"probe/{secrets.token_hex(8)}"
        await self._gateway.txn({"success": [_put(self._key(name), nonce)]})
        return f"{ETCD}{self._prefix}/{name}"

    async def read_probe(self, probe: str) -> bytes | None:
        """Read such a nonce, or None: it is not here. The place is hostile. Raises StorageFailed."""
        name = probe.removeprefix(f"{ETCD}{self._prefix}/")
        if not _PROBE.fullmatch(name):
            raise StorageFailed(f"{probe[:200]!r} is no probe below {self._prefix}")
        return _only_value(await self._gateway.txn({"success": [_get(self._key(name))]}), 0)

    async def clear_probe(self, probe: str) -> None:
        """Take such a nonce away. Raises StorageFailed."""
        key = probe.removeprefix(ETCD).encode()
        await self._gateway.txn({"success": [{"request_delete_range": {"key": _text(key)}}]})

    # ------------------------------------------------------------------ keys and comparisons

    def _key(self, name: str) -> bytes:
        return f"{self._prefix}/{name}".encode()

    def _place_of(self, identity: bytes) -> str:
        return f"{ETCD}{self._prefix}#{identity.decode('ascii', 'replace')}"

    def _range(self, guest_id: str) -> tuple[bytes, bytes]:
        """From the first record that a guest may have to behind the last."""
        record_name(guest_id, 1)  # refuses an identity that could name something else
        return self._key(f"records/{guest_id}.0"), self._key(f"records/{guest_id}.:")

    def _newest(self, guest_id: str) -> dict[str, object]:
        first, end = self._range(guest_id)
        asked: dict[str, object] = {"key": _text(first), "range_end": _text(end)}
        return {"request_range": asked | {"limit": "1", "sort_order": "DESCEND", "sort_target": "KEY"}}

    def _is_here(self, directory: str) -> dict[str, object]:
        prefix, _, identity = directory.removeprefix(ETCD).rpartition("#")
        if prefix != self._prefix or not identity:
            raise StorageFailed(_elsewhere(directory))
        key = self._key("identity")
        return {"key": _text(key), "target": "VALUE", "result": "EQUAL", "value": _text(identity.encode())}


def _elsewhere(directory: str) -> str:
    return f"the ownership record is in {directory[:200]}, and this host reaches another etcd, or has another prefix"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _put(key: bytes, value: bytes) -> dict[str, object]:
    return {"request_put": {"key": _text(key), "value": _text(value)}}


def _get(key: bytes) -> dict[str, object]:
    return {"request_range": {"key": _text(key)}}


def _is_missing(key: bytes, end: bytes | None = None) -> dict[str, object]:
    compare: dict[str, object] = {
        "key": _text(key),
        "target": "CREATE",
        "result": "EQUAL",
        "create_revision": "0",
    }
    return compare if end is None else compare | {"range_end": _text(end)}


def _is_there(key: bytes) -> dict[str, object]:
    return {"key": _text(key), "target": "CREATE", "result": "GREATER", "create_revision": "0"}


def _only_value(answer: dict[str, object], number: int) -> bytes | None:
    """Give the value that a transaction's `number`-th question found, or None."""
    found = _found(answer, number)
    return None if found is None else found[1]


def _record(answer: dict[str, object], number: int, guest_id: str) -> Ownership | None:
    found = _found(answer, number)
    if found is None:
        return None
    key, value = found
    record = parse_record(value)
    name = record_name(record.guest_id, record.generation)
    if record.guest_id != guest_id or not key.endswith(f"/records/{name}".encode()):
        raise RecordInvalid(f"{key.decode('ascii', 'replace')} speaks of another guest or generation")
    return record


def _found(answer: dict[str, object], number: int) -> tuple[bytes, bytes] | None:
    """Give the key and value of a range's first result. Raises StorageFailed: this is no etcd's answer."""
    try:
        responses = answer["responses"]
        asked = responses[number]["response_range"]  # type: ignore[index]
        if not (pairs := asked.get("kvs", [])):
            return None
        return base64.b64decode(pairs[0]["key"], validate=True), base64.b64decode(
            pairs[0]["value"], validate=True
        )
    except (LookupError, TypeError, AttributeError, ValueError, binascii.Error) as exc:
        raise StorageFailed("etcd gave an answer that is none of a transaction") from exc
