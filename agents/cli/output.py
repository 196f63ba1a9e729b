"""What commands print: tables for people, JSON for programs, errors with their exit codes.

Law: the one place that knows exit codes. Text of peers and guests never drives the terminal: what is not
printable is escaped. Colour only on a terminal (and not with NO_COLOR); a pipe gets every column in full.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum, IntEnum
from pathlib import PurePath
from types import MappingProxyType
from typing import Final, TextIO, TypeVar

import click

__all__ = [
    "Exit",
    "escaped",
    "exit_code_of",
    "json_option",
    "print_error",
    "print_facts",
    "print_json",
    "print_table",
    "to_json",
]

F = TypeVar("F", bound=Callable[..., object])

# A pipe has no width; this is wider than any row, and rich wants a number.
_PIPE_COLUMNS: Final = 10_000


class Exit(IntEnum):
    """The exit codes of all commands, as `vmferry --help` lists them."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    IN_DOUBT = 4
    INTERRUPTED = 130


def json_option(command: F) -> F:
    """Add `--json`, which arrives as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value for programs.")(command)


def print_json(value: object) -> None:
    """Print one value: dataclasses become objects, bytes hexadecimal, paths and enums their text."""
    # ASCII, so that no text of a guest drives a terminal that shows it.
    click.echo(json.dumps(to_json(value), indent=2, ensure_ascii=True).replace("\x7f", "\\u007f"))


def to_json(value: object) -> object:
    """Give the JSON value of anything that commands print.

    Raises:
        TypeError: a type that has no JSON here (ours).
    """
    if isinstance(value, Enum):
        return to_json(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [to_json(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no JSON here")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    empty: str,
    styles: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print rows under their headings, or the sentence `empty` on stderr when there are none.

    A column whose heading begins with `>` is aligned to the right: numbers. `styles` are rich's, for cells that are
    exactly such a word.
    """
    if not rows:
        click.echo(empty, err=True)
        return
    # Imported here: rich takes longer than everything else that `--json` needs.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        is_number = column.startswith(">")
        table.add_column(
            Text(column.removeprefix(">")), justify="right" if is_number else "left", overflow="fold"
        )
    for row in rows:
        cells = [escaped(str(cell)) for cell in row]
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in cells))
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS
    Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False).print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Print one thing as `name  value` lines."""
    widest = max(map(len, facts), default=0)
    for name, value in facts.items():
        click.echo(f"{name:<{widest}}  {escaped(str(value))}")


def escaped(text: str, *, keep_lines: bool = False) -> str:
    """Give `text` with everything that is not printable as an escape.

    With `keep_lines` its lines stay lines, and all but the first are indented: none of them can pass for ours.
    """
    if keep_lines:
        first, *rest = text.split("\n")
        return "\n".join([escaped(first), *(f"  {escaped(line.strip())}" for line in rest)])
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def print_error(exc: BaseException, stream: TextIO | None = None) -> None:
    """Print `error: cause. remedy` to stderr, for each error that `exc` holds; Ctrl-C is none."""
    stream = stream or sys.stderr
    for leaf in _leaves(exc):
        if isinstance(leaf, KeyboardInterrupt | click.Abort):
            continue
        text = leaf.format_message() if isinstance(leaf, click.ClickException) else str(leaf)
        word = "error:"
        if stream.isatty() and "NO_COLOR" not in os.environ:
            word = click.style(word, fg="red", bold=True)
        click.echo(f"{word} {escaped(text or type(leaf).__name__, keep_lines=True)}", file=stream, color=True)
        if isinstance(leaf, click.UsageError) and leaf.ctx is not None:
            click.echo(f"Try `{leaf.ctx.command_path} --help`.", file=stream)


def exit_code_of(exc: BaseException) -> Exit | None:
    """Give the code of an error, or of the gravest in a group of them; None: not an error that is known."""
    codes = [_code_of_leaf(leaf) for leaf in _leaves(exc)]
    known = [code for code in codes if code is not None]
    if len(known) < len(codes):
        return None
    return max(known, key=_GRAVITY.index, default=None)


# In doubt outweighs everything: somebody must look. An interruption explains the errors beside it.
_GRAVITY: Final = (Exit.OK, Exit.USAGE, Exit.REFUSED, Exit.UNREACHABLE, Exit.INTERRUPTED, Exit.IN_DOUBT)


def _code_of_leaf(exc: BaseException) -> Exit | None:
    from agents.errors import AgentError, NotFound, RequestRefused, SettingsError
    from migrate.errors import InDoubt, MigrationError
    from transport.errors import LocalMisuse, PeerRefused, TransportError

    match exc:
        case KeyboardInterrupt() | click.Abort():
            return Exit.INTERRUPTED
        case click.UsageError() | SettingsError():
            return Exit.USAGE
        case InDoubt():
            return Exit.IN_DOUBT
        case RequestRefused(code="unreachable"):
            # The agent that was asked could not reach another one.
            return Exit.UNREACHABLE
        case NotFound(unreachable=unreachable) if unreachable:
            # It may be where nobody answered.
            return Exit.UNREACHABLE
        case PeerRefused():
            # It was reached, and said no.
            return Exit.REFUSED
        case LocalMisuse():
            return None
        case TransportError():
            return Exit.UNREACHABLE
        case click.ClickException() | MigrationError() | AgentError():
            return Exit.REFUSED
        case _:
            return None


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
