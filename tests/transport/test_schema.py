"""What may pass the border where foreign bytes become values."""

from __future__ import annotations

import contextlib
import enum
import math
from dataclasses import dataclass
from typing import Literal

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import limits
from transport.errors import BadMessage, FrameTooLarge, LocalMisuse, PeerMisbehaved
from transport.schema import Schema


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    name: str
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDone:
    number: int
    ratio: float
    is_last: bool
    blob: bytes
    inner: Inner | None
    names: tuple[str, ...]
    table: dict[str, tuple[int, ...]]
    colour: Colour
    level: Level
    choice: Literal["a", "b", 3]
    note: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picky:
    percent: int

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 100:
            raise ValueError("a percentage is 0 to 100")


SCHEMA = Schema(RoundDone, Picky, Inner)

FIELDS: dict[str, object] = {
    "number": 1,
    "ratio": 0.5,
    "is_last": True,
    "blob": b"\x00",
    "inner": {"name": "x", "weight": None},
    "names": ["p", "q"],
    "table": {"k": [1, 2]},
    "colour": "red",
    "level": 2,
    "choice": 3,
}

ints = st.integers(-(1 << 63), (1 << 64) - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
inners = st.builds(Inner, name=texts, weight=st.none() | st.floats(allow_nan=False, allow_infinity=False))
rounds = st.builds(
    RoundDone,
    number=ints,
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    is_last=st.booleans(),
    blob=st.binary(max_size=100),
    inner=st.none() | inners,
    names=st.lists(texts, max_size=4).map(tuple),
    table=st.dictionaries(texts, st.lists(ints, max_size=3).map(tuple), max_size=3),
    colour=st.sampled_from(Colour),
    level=st.sampled_from(Level),
    choice=st.sampled_from(["a", "b", 3]),
    note=texts,
)


def wire(tag: object = "round-done", **changes: object) -> bytes:
    fields = {name: value for name, value in (FIELDS | changes).items() if value is not Ellipsis}
    return bytes(msgpack.packb([tag, fields]))


@settings(deadline=None, max_examples=60)
@given(rounds)
def test_every_message_comes_back_as_it_went(message: RoundDone) -> None:
    assert SCHEMA.decode(SCHEMA.encode(message)) == message
    assert SCHEMA.decode(memoryview(SCHEMA.encode(message))) == message


def test_the_tag_is_the_name_of_the_class_in_kebab_case() -> None:
    assert SCHEMA.encode(Inner(name="x")) == bytes(msgpack.packb(["inner", {"name": "x", "weight": None}]))
    assert msgpack.unpackb(wire())[0] == "round-done"
    assert isinstance(SCHEMA.decode(wire()), RoundDone)


def test_a_missing_key_takes_its_default() -> None:
    message = SCHEMA.decode(wire())
    assert isinstance(message, RoundDone)
    assert message.note == "none"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"number": True}, "number is not a 64-bit int"),
        ({"number": 1.0}, "number is not a 64-bit int"),
        ({"number": None}, "number is not"),
        ({"number": ...}, "lacks number"),
        ({"ratio": 1}, "ratio is not a finite float"),
        ({"ratio": math.nan}, "ratio is not a finite float"),
        ({"ratio": math.inf}, "ratio is not a finite float"),
        ({"is_last": 1}, "is_last is not a bool"),
        ({"blob": "text"}, "blob is not bytes"),
        ({"inner": {}}, "inner lacks name"),
        ({"inner": {"name": "x", "evil": 1}}, "unknown key 'evil'"),
        ({"inner": ["x"]}, "inner is not a map"),
        ({"names": "pq"}, "names is not a list"),
        ({"names": [1]}, "names is not text"),
        ({"table": [1]}, "table is not a map"),
        ({"table": {"k": 1}}, "table is not a list"),
        ({"colour": "green"}, "colour is no Colour"),
        ({"colour": 1}, "colour is no Colour"),
        ({"level": True}, "level is no Level"),
        ({"level": 3}, "level is no Level"),
        ({"choice": "c"}, "choice is none of"),
        ({"choice": 3.0}, "choice is none of"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_each_wrong_field_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadMessage, match=words):
        SCHEMA.decode(wire(**changes))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x90",
        b"\x92\xa1x",
        wire() + b"\x00",
        wire()[:-1],
        wire(tag="no-such-message"),
        wire(tag=1),
        bytes(msgpack.packb(["round-done"])),
        bytes(msgpack.packb(["round-done", []])),
        b"\x92\xa5inner\x82\xa4name\xa1x\xa4name\xa1y",  # a key twice
        b"\x92\xa5inner\x81\xa4name\xa2\xff\xfe",  # not UTF-8
        b"\x92\xa5inner\x81\x01\xa1x",  # a key that is no text
        b"\x92\xa5inner\xc7\x01\x05x",  # an extension type
        b"\xdd\xff\xff\xff\xff",  # four billion values announced
        b"\xdf\x7f\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ],
)
def test_what_is_no_message_is_a_bad_message(data: bytes) -> None:
    with pytest.raises(BadMessage):
        SCHEMA.decode(data)


def test_what_a_class_itself_refuses_is_a_bad_message() -> None:
    assert SCHEMA.decode(bytes(msgpack.packb(["picky", {"percent": 100}]))) == Picky(percent=100)
    with pytest.raises(BadMessage, match="0 to 100"):
        SCHEMA.decode(bytes(msgpack.packb(["picky", {"percent": 101}])))


@pytest.mark.parametrize("nesting", [limits.MAX_DEPTH + 1, 100_000])
def test_deeper_than_the_limit_is_refused_before_anything_is_built(nesting: int) -> None:
    with pytest.raises(BadMessage, match="deeper"):
        SCHEMA.decode(b"\x91" * nesting + b"\xc0")


def test_one_value_more_than_the_limit_is_refused() -> None:
    def message(items: int) -> bytes:
        return bytes(msgpack.packb(["inner", [None] * items]))

    with pytest.raises(BadMessage, match="not a map"):
        SCHEMA.decode(message(limits.MAX_ITEMS - 3))
    with pytest.raises(BadMessage, match="more than"):
        SCHEMA.decode(message(limits.MAX_ITEMS - 2))


def test_text_at_its_limit_passes_and_one_byte_more_does_not() -> None:
    longest = Inner(name="x" * limits.MAX_TEXT_BYTES)
    assert SCHEMA.decode(SCHEMA.encode(longest)) == longest
    with pytest.raises(LocalMisuse):
        SCHEMA.encode(Inner(name="x" * (limits.MAX_TEXT_BYTES + 1)))
    with pytest.raises(BadMessage):
        SCHEMA.decode(bytes(msgpack.packb(["inner", {"name": "x" * (limits.MAX_TEXT_BYTES + 1)}])))


def test_a_message_at_its_limit_passes_and_one_byte_more_does_not() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Blob:
        blob: bytes

    schema = Schema(Blob)
    overhead = len(schema.encode(Blob(blob=bytes(1 << 16)))) - (1 << 16)
    largest = Blob(blob=bytes(limits.MAX_MESSAGE_BYTES - overhead))
    encoded = schema.encode(largest)
    assert len(encoded) == limits.MAX_MESSAGE_BYTES
    assert schema.decode(encoded) == largest
    with pytest.raises(LocalMisuse):
        schema.encode(Blob(blob=bytes(limits.MAX_MESSAGE_BYTES - overhead + 1)))
    with pytest.raises(FrameTooLarge):
        schema.decode(encoded + b"\x00")


@pytest.mark.parametrize(
    "message",
    [
        Inner(name="\ud800"),
        Inner(name=5),  # type: ignore[arg-type]
        Inner(name="x", weight=math.nan),
        Picky,
        "text",
    ],
)
def test_what_may_not_be_sent_is_a_bug_of_the_sender(message: object) -> None:
    with pytest.raises(LocalMisuse):
        SCHEMA.encode(message)


def test_an_int_may_stand_for_a_float_and_arrives_as_one() -> None:
    message = SCHEMA.decode(SCHEMA.encode(Inner(name="x", weight=3)))
    assert isinstance(message, Inner)
    assert type(message.weight) is float


def test_types_that_cannot_travel_are_refused_when_the_schema_is_made() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Listy:
        items: list[int]

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Either:
        item: int | str

    for wrong in (Listy, Either, int, SelfHolding):
        with pytest.raises(LocalMisuse):
            Schema(wrong)
    with pytest.raises(LocalMisuse):
        Schema(Inner, Inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfHolding:
    inner: SelfHolding | None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_raises_only_bad_message(data: bytes) -> None:
    with pytest.raises(PeerMisbehaved):
        SCHEMA.decode(data)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_message_with_one_byte_changed_raises_only_bad_message(at: int, value: int) -> None:
    data = bytearray(wire())
    data[at % len(data)] = value
    with contextlib.suppress(PeerMisbehaved):
        SCHEMA.decode(bytes(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    names: tuple[str, ...]


LONGEST = "x" * limits.MAX_TEXT_BYTES


@pytest.mark.parametrize("names", [(), ("",), ("a", "ä", "\u20ac"), (LONGEST, LONGEST, "x")])
def test_texts_travel_in_any_number(names: tuple[str, ...]) -> None:
    schema = Schema(Names)
    assert schema.decode(schema.encode(Names(names=names))) == Names(names=names)


@pytest.mark.parametrize(
    "wrong",
    [5, b"x", None, Colour.RED, "\ud800", LONGEST + "x", ("x",)],
    ids=lambda wrong: type(wrong).__name__,
)
def test_one_that_is_no_text_is_found_among_many(wrong: object) -> None:
    schema = Schema(Names)
    many = ("a", "b", wrong, "c")
    with pytest.raises(LocalMisuse, match="names must be text"):
        schema.encode(Names(names=many))  # type: ignore[arg-type]
    if not isinstance(wrong, str):
        with pytest.raises(BadMessage, match="names is not text"):
            schema.decode(msgpack.packb(["names", {"names": many}]))
