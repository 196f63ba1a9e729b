"""Messages that have the right types and the wrong values: what somebody sends who has a good certificate.

Law: everything that is made here can be encoded by the schema, so that it reaches the code behind it. A message with
no change is an honest one: sequences of them come as far as an honest peer does, and turn hostile there.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Final, TypeVar

from tests.fuzz.drawing import Draw

__all__ = ["TEXTS", "changed", "example", "value_of"]

M = TypeVar("M")

# Words that somebody might choose. The long ones are as long as text may be on the wire, and longer when quoted.
TEXTS: Final = (
    *("", "\0", ".", "..", "/", "a", "host-a", "host-b", "/etc/passwd", "../../etc/passwd", "a/b", "-x"),
    *("a" * 128, "a" * 129, "b" * 5000, "c" * (64 << 10), "d" * (256 << 10), "\x01" * (256 << 10)),
    *("/" + "e/" * 1000, "/x" * (128 << 10), "\u202e\x1b[2J\r\n", "ü" * 200, "\U0001f4a9", "%s{0}"),
)
_BLOB_SIZES: Final = (0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 255, 4096, 16 << 10, 64 << 10, 1 << 20)
_FLOATS: Final = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, -1e300, 1.7976931348623157e308, 3600.0)
_MANY: Final = (2, 3, 65, 1000, 8000)
_MOST_CHANGES: Final = 4


def changed(message: M, draw: Draw) -> M:
    """Give a message with some of its fields changed; with a first byte of 0 none of them."""
    for _ in range(draw.byte() % (_MOST_CHANGES + 1)):
        message = _with_one_change(message, draw)
    return message


def _with_one_change(message: M, draw: Draw) -> M:
    if not dataclasses.is_dataclass(message) or not (fields := dataclasses.fields(message)):
        return message
    name = draw.pick([field.name for field in fields])
    hint = typing.get_type_hints(type(message))[name]
    try:
        return dataclasses.replace(message, **{name: value_of(hint, getattr(message, name), draw)})  # type: ignore[type-var]
    except ValueError:
        return message  # the class itself refuses it: nobody can send that


def value_of(hint: object, honest: object, draw: Draw) -> object:
    """Give a value of a field's type, beginning from an honest one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(each for each in arguments if each is not type(None))
        return None if draw.flag() else value_of(inner, honest, draw)
    if origin is tuple:
        return _several(arguments[0], honest if isinstance(honest, tuple) else (), draw)
    if hint is bool:
        return draw.flag()
    if hint is int:
        return draw.number()
    if hint is float:
        return draw.pick(_FLOATS)
    if hint is str:
        return _text(honest, draw)
    if hint is bytes:
        return _blob(honest, draw)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return draw.pick(list(hint))
    if dataclasses.is_dataclass(hint) and honest is not None:
        return _with_one_change(honest, draw)
    return honest


def _several(hint: object, honest: tuple[object, ...], draw: Draw) -> tuple[object, ...]:
    match draw.byte() % 5:
        case 0:
            return ()
        case 1:
            return honest[::-1]
        case 2:
            return honest * draw.pick(_MANY)
        case 3 if hint is str or hint is bytes or hint is int:
            return (value_of(hint, None, draw),) * draw.pick(_MANY)
        case _:
            at = draw.byte() % max(len(honest), 1)
            return tuple(
                value_of(hint, one, draw) if number == at else one for number, one in enumerate(honest)
            )


def _text(honest: object, draw: Draw) -> str:
    which = draw.byte()
    if which < 0xC0:
        return TEXTS[which % len(TEXTS)]
    words = draw.take(which & 0x1F).decode("utf-8", "ignore")
    return words if which < 0xE0 else f"{honest}{words}"


def _blob(honest: object, draw: Draw) -> bytes:
    which = draw.byte()
    if which < 0x80:
        return bytes([draw.byte()]) * _BLOB_SIZES[which % len(_BLOB_SIZES)]
    if which < 0xC0 and isinstance(honest, bytes) and honest:
        at = draw.byte() * len(honest) >> 8
        return honest[:at] + bytes([honest[at] ^ (draw.byte() or 1)]) + honest[at + 1 :]
    return draw.sized()


def example(kind: type[M]) -> M:
    """Give a message of a type with something in each of its fields: a seed."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _example_of(hint) for name, hint in hints.items()})


def _example_of(hint: object) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _example_of(next(each for each in arguments if each is not type(None)))
    if origin is tuple:
        return (_example_of(arguments[0]),)
    if origin is dict:
        return {"key": _example_of(arguments[1])}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next(iter(hint))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return example(hint)
    return _EXAMPLES[hint]


_EXAMPLES: Final[dict[object, object]] = {
    bool: True,
    int: 7,
    float: 0.5,
    str: "word",
    bytes: bytes(range(16)),
}
