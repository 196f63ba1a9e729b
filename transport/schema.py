"""Strict codec of frozen dataclasses to msgpack and back: the border where foreign bytes become values.

Law: nothing passes that the dataclass does not say. A message travels as `[tag, {field: value}]`; the tag is
the class name in kebab case (`RoundDone` is `round-done`), fields have the names that they have in the code.

* Unknown tag, unknown key, repeated key, wrong type (a bool is no int, an int is no float), NaN and infinity,
  text that is not UTF-8, trailing bytes, too deep, too many, too long: `BadMessage`.
* A key that is missing takes the field's default, and is `BadMessage` where there is none: this is how a
  release talks to the one before it.
* What a class's own `__post_init__` refuses with ValueError is `BadMessage`, too.

Before a single object is built, `_measure` walks the bytes, so that no input makes more than `limits.MAX_ITEMS`
objects. Source: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, cast

import msgpack

from transport import limits
from transport.errors import BadMessage, FrameTooLarge, LocalMisuse

__all__ = ["Schema"]

_MIN_INT: Final = -(1 << 63)
_MAX_INT: Final = (1 << 64) - 1  # what msgpack can carry

# Any stands for what msgpack gives and takes; it does not leave this module.
_Convert = Callable[[object, str], object]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How one type goes to msgpack (`pack`) and comes back (`unpack`); `depth` counts its containers.

    Both take the value and the path to it (for the sentence of an error).
    """

    pack: _Convert
    unpack: _Convert
    depth: int


# Plans that are made; None while a type's plan is being made, which shows a type that holds itself.
_Plans = dict[type, _Plan | None]


class Schema:
    """The messages that may travel on one channel.

    Field types: int (64 bits), float (finite), bool, str, bytes, `X | None`, `tuple[T, ...]`, `dict[str, T]`,
    StrEnum, IntEnum, Literal, and dataclasses of these. Plans are made here, once.

    Raises:
        LocalMisuse: a type is no dataclass, has a field of another type, or two have the same tag.
    """

    def __init__(self, *message_types: type) -> None:
        self.message_types: Final = message_types
        plans: _Plans = {}
        self._by_tag: dict[str, _Plan] = {}
        self._by_type: dict[type, tuple[str, _Plan]] = {}
        for message_type in message_types:
            tag = _tag(message_type)
            if tag in self._by_tag:
                raise LocalMisuse(f"two message types have the tag {tag}")
            if not dataclasses.is_dataclass(message_type):
                raise LocalMisuse(f"a message is a dataclass, {message_type.__name__} is none")
            plan = _record(message_type, plans)
            if plan.depth + 1 > limits.MAX_DEPTH:
                raise LocalMisuse(f"{message_type.__name__} is nested deeper than {limits.MAX_DEPTH}")
            self._by_tag[tag] = plan
            self._by_type[message_type] = (tag, plan)

    def encode(self, message: object) -> bytes:
        """Give the bytes of a message.

        Raises:
            LocalMisuse: it is not of this schema, or larger than `limits.MAX_MESSAGE_BYTES`.
        """
        known = self._by_type.get(type(message))
        if known is None:
            raise LocalMisuse(f"{type(message).__name__} is not a message of this channel")
        tag, plan = known
        packed = msgpack.packb([tag, plan.pack(message, tag)], use_bin_type=True)
        if len(packed) > limits.MAX_MESSAGE_BYTES:
            raise LocalMisuse(
                f"{tag} has {len(packed)} bytes, more than the {limits.MAX_MESSAGE_BYTES} a message may have"
            )
        try:
            _measure(packed)
        except BadMessage as exc:
            raise LocalMisuse(f"{tag} is more than a message may be: {exc}") from exc
        return bytes(packed)

    def decode(self, data: bytes | memoryview) -> object:
        """Give the message that `data` is.

        Raises:
            BadMessage: it is not one of this schema (the peer's fault).
            FrameTooLarge: it has more than `limits.MAX_MESSAGE_BYTES`.
        """
        if len(data) > limits.MAX_MESSAGE_BYTES:
            raise FrameTooLarge(len(data), limits.MAX_MESSAGE_BYTES)
        _measure(data)
        try:
            value = msgpack.unpackb(
                data,
                raw=False,
                strict_map_key=True,
                object_pairs_hook=_unique,
                max_str_len=limits.MAX_TEXT_BYTES,
                max_bin_len=limits.MAX_MESSAGE_BYTES,
                max_array_len=limits.MAX_ITEMS,
                max_map_len=limits.MAX_ITEMS,
                max_ext_len=0,
            )
        except UnicodeDecodeError as exc:
            raise BadMessage("text that is not UTF-8") from exc
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise BadMessage(f"not msgpack: {exc}") from exc
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
            raise BadMessage("not a pair of tag and fields")
        plan = self._by_tag.get(value[0])
        if plan is None:
            raise BadMessage(f"unknown message {value[0][:64]!r}")
        return plan.unpack(value[1], value[0])


def _tag(message_type: type) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", message_type.__name__).lower()


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise BadMessage("a key stands twice in one map")
    return table


# --- the walk over the bytes ---------------------------------------------------------------------------------

# First byte -> (bytes of the length that follow, unit): B has a body of that length, A has that many values, M
# twice as many; F has a fixed body. Extension types are not in the table: no message has them.
_SIZED: Final[dict[int, tuple[int, str]]] = {
    0xC4: (1, "B"),
    0xC5: (2, "B"),
    0xC6: (4, "B"),
    0xD9: (1, "B"),
    0xDA: (2, "B"),
    0xDB: (4, "B"),
    0xDC: (2, "A"),
    0xDD: (4, "A"),
    0xDE: (2, "M"),
    0xDF: (4, "M"),
}
_FIXED_BODY: Final[dict[int, int]] = {
    **dict.fromkeys((0xC0, 0xC2, 0xC3), 0),
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
    0xCA: 4,
    0xCB: 8,
}


def _measure(data: bytes | memoryview) -> None:
    """Check that `data` is exactly one value within the limits of depth and number, building nothing."""
    end = len(data)
    at = 0
    items = 0
    open_counts = [1]  # values still to come, for each container that is open
    while open_counts:
        if open_counts[-1] == 0:
            open_counts.pop()
            continue
        open_counts[-1] -= 1
        items += 1
        if items > limits.MAX_ITEMS:
            raise BadMessage(f"more than {limits.MAX_ITEMS} values")
        if at >= end:
            raise BadMessage("the message ends too early")
        first = data[at]
        at += 1
        inside = 0
        if first <= 0x7F or first >= 0xE0:
            continue
        if first <= 0x8F:
            inside = 2 * (first & 0x0F)
        elif first <= 0x9F:
            inside = first & 0x0F
        elif first <= 0xBF:
            at += first & 0x1F
        elif first in _SIZED:
            width, unit = _SIZED[first]
            length = int.from_bytes(data[at : at + width], "big")
            at += width
            if unit == "B":
                at += length
            else:
                inside = length * (2 if unit == "M" else 1)
        elif first in _FIXED_BODY:
            at += _FIXED_BODY[first]
        else:
            raise BadMessage(f"a value of type 0x{first:02x}, which no message has")
        if inside > limits.MAX_ITEMS:
            raise BadMessage(f"more than {limits.MAX_ITEMS} values")
        if inside:
            open_counts.append(inside)
            if len(open_counts) - 1 > limits.MAX_DEPTH:
                raise BadMessage(f"nested deeper than {limits.MAX_DEPTH}")
    if at != end:
        raise BadMessage("the message ends too early" if at > end else "bytes follow the message")


# --- plans, one per type ------------------------------------------------------------------------------------


def _plan_of(hint: object, plans: _Plans, where: str) -> _Plan:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        present = [each for each in arguments if each is not type(None)]
        if len(present) == 1 and len(arguments) == 2:
            return _optional(_plan_of(present[0], plans, where))
    elif origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _sequence(_plan_of(arguments[0], plans, where))
    elif origin is dict and arguments[0] is str:
        return _table(_plan_of(arguments[1], plans, where))
    elif origin is Literal:
        return _literal(arguments)
    elif isinstance(hint, type):
        if hint in _SCALARS:
            return _SCALARS[hint]
        if issubclass(hint, enum.Enum) and issubclass(hint, str | int):
            return _enumeration(hint)
        if dataclasses.is_dataclass(hint):
            return _record(hint, plans)
    raise LocalMisuse(f"{where} has a type that cannot travel: {hint}")


def _scalar(wanted: type, check: Callable[[Any], bool], article: str) -> _Plan:
    def pack(value: object, path: str) -> object:
        if type(value) is not wanted or not check(value):
            raise LocalMisuse(f"{path} must be {article}, not {value!r:.80}")
        return value

    def unpack(value: object, path: str) -> object:
        if type(value) is not wanted or not check(value):
            raise BadMessage(f"{path} is not {article}")
        return value

    return _Plan(pack=pack, unpack=unpack, depth=0)


def _is_text(value: str) -> bool:
    try:
        return len(value.encode()) <= limits.MAX_TEXT_BYTES
    except UnicodeEncodeError:
        return False


def _are_texts(values: Sequence[object]) -> bool:
    """Judge whether all are text that may travel, without a look at each: many short ones are. False says nothing."""
    if set(map(type, values)) - {str}:
        return False
    return _is_text("".join(cast(Sequence[str], values)))


def _float_plan() -> _Plan:
    strict = _scalar(float, math.isfinite, "a finite float")

    def pack(value: object, path: str) -> object:
        # mypy lets an int stand where a float is wanted; on the wire it is a float.
        return strict.pack(float(value) if type(value) is int else value, path)

    return _Plan(pack=pack, unpack=strict.unpack, depth=0)


_SCALARS: Final[dict[type, _Plan]] = {
    int: _scalar(int, lambda value: _MIN_INT <= value <= _MAX_INT, "a 64-bit int"),
    float: _float_plan(),
    bool: _scalar(bool, lambda value: True, "a bool"),
    str: _scalar(str, _is_text, f"text of at most {limits.MAX_TEXT_BYTES} bytes"),
    bytes: _scalar(bytes, lambda value: True, "bytes"),
}


def _optional(inner: _Plan) -> _Plan:
    return _Plan(
        pack=lambda value, path: None if value is None else inner.pack(value, path),
        unpack=lambda value, path: None if value is None else inner.unpack(value, path),
        depth=inner.depth,
    )


def _sequence(inner: _Plan) -> _Plan:
    # The models of QEMU 7.2 have 5768 names of features, all in one message.
    is_text = inner is _SCALARS[str]

    def pack(value: object, path: str) -> object:
        if type(value) is not tuple:
            raise LocalMisuse(f"{path} must be a tuple, not {value!r:.80}")
        if is_text and _are_texts(value):
            return list(value)
        return [inner.pack(each, path) for each in value]

    def unpack(value: object, path: str) -> object:
        if type(value) is not list:
            raise BadMessage(f"{path} is not a list")
        if is_text and _are_texts(value):
            return tuple(value)
        return tuple([inner.unpack(each, path) for each in value])

    return _Plan(pack=pack, unpack=unpack, depth=inner.depth + 1)


def _table(inner: _Plan) -> _Plan:
    key_plan = _SCALARS[str]

    def pack(value: object, path: str) -> object:
        if type(value) is not dict:
            raise LocalMisuse(f"{path} must be a dict, not {value!r:.80}")
        return {key_plan.pack(key, path): inner.pack(each, path) for key, each in value.items()}

    def unpack(value: object, path: str) -> object:
        if type(value) is not dict:
            raise BadMessage(f"{path} is not a map")
        return {key_plan.unpack(key, path): inner.unpack(each, path) for key, each in value.items()}

    return _Plan(pack=pack, unpack=unpack, depth=inner.depth + 1)


def _literal(choices: tuple[Any, ...]) -> _Plan:
    for each in choices:
        if type(each) not in (str, int, bool):
            raise LocalMisuse(f"a Literal of {each!r} cannot travel")

    def is_choice(value: object) -> bool:
        # True == 1 in Python, not on the wire.
        return any(type(value) is type(each) and value == each for each in choices)

    def pack(value: object, path: str) -> object:
        if not is_choice(value):
            raise LocalMisuse(f"{path} must be one of {choices}, not {value!r:.80}")
        return value

    def unpack(value: object, path: str) -> object:
        if not is_choice(value):
            raise BadMessage(f"{path} is none of {choices}")
        return value

    return _Plan(pack=pack, unpack=unpack, depth=0)


def _enumeration(enumeration: type[enum.Enum]) -> _Plan:
    wire_type = str if issubclass(enumeration, str) else int

    def pack(value: object, path: str) -> object:
        if type(value) is not enumeration:
            raise LocalMisuse(f"{path} must be a {enumeration.__name__}, not {value!r:.80}")
        return wire_type(value.value)

    def unpack(value: object, path: str) -> object:
        if type(value) is not wire_type:
            raise BadMessage(f"{path} is no {enumeration.__name__}")
        try:
            return enumeration(value)
        except ValueError as exc:
            raise BadMessage(f"{path} is no {enumeration.__name__}: {value!r:.80}") from exc

    return _Plan(pack=pack, unpack=unpack, depth=0)


def _record(record_type: type, plans: _Plans) -> _Plan:
    """The plan of a dataclass: a map of its fields. A type that holds itself is refused: it has no depth."""
    if record_type in plans:
        known = plans[record_type]
        if known is None:
            raise LocalMisuse(f"{record_type.__name__} holds itself")
        return known
    plans[record_type] = None
    hints = typing.get_type_hints(record_type)
    fields = {field.name: field for field in dataclasses.fields(record_type)}
    inner = {name: _plan_of(hints[name], plans, f"{record_type.__name__}.{name}") for name in fields}
    required = frozenset(
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )

    def pack(value: object, path: str) -> object:
        if type(value) is not record_type:
            raise LocalMisuse(f"{path} must be a {record_type.__name__}, not {value!r:.80}")
        return {name: plan.pack(getattr(value, name), f"{path}.{name}") for name, plan in inner.items()}

    def unpack(value: object, path: str) -> object:
        if type(value) is not dict:
            raise BadMessage(f"{path} is not a map")
        for name in value:
            if name not in inner:
                raise BadMessage(f"{path} has an unknown key {name!r:.80}")
        if missing := required - value.keys():
            raise BadMessage(f"{path} lacks {sorted(missing)[0]}")
        arguments = {name: inner[name].unpack(each, f"{path}.{name}") for name, each in value.items()}
        try:
            return record_type(**arguments)
        except ValueError as exc:
            raise BadMessage(f"{path}: {exc}") from exc

    plan = _Plan(pack=pack, unpack=unpack, depth=1 + max((each.depth for each in inner.values()), default=0))
    plans[record_type] = plan
    return plan
