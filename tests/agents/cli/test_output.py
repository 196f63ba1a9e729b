from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.cli.output import (
    Exit,
    escaped,
    exit_code_of,
    print_error,
    print_facts,
    print_json,
    print_table,
    to_json,
)
from agents.errors import (
    Ambiguous,
    ConfigInvalid,
    HostUnknown,
    JournalCorrupt,
    NotFound,
    PkiRefused,
    QuantityInvalid,
    RequestRefused,
)
from migrate.errors import InDoubt, MigrationFailed, SetupRefused
from transport import errors as transport_errors


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    name: str
    digest: bytes
    colour: Colour
    parts: tuple[int, ...]


def test_values_become_json_by_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    thing = Thing(name="a\u202eb", digest=b"\x01\xff", colour=Colour.RED, parts=(1, 2))
    print_json({"thing": thing, "path": Path("/x"), "at": datetime(2026, 1, 2, tzinfo=UTC), "none": None})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown) == {
        "thing": {"name": "a\u202eb", "digest": "01ff", "colour": "red", "parts": [1, 2]},
        "path": "/x",
        "at": "2026-01-02T00:00:00+00:00",
        "none": None,
    }


def test_what_has_no_json_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="object has no JSON"):
        to_json(object())


def test_a_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 500
    print_table(["GUEST", ">RAM"], [[long, "1 GiB"], ["web", "512 MiB"]], empty="none")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == f"{long}    1 GiB"
    assert lines[2] == f"web{' ' * 497}  512 MiB"
    assert "\x1b" not in "".join(lines)


def test_cells_are_neither_markup_nor_terminal_codes(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["GUEST"], [["[red]x[/red] \x1b[31m :smile:"]], empty="none")
    assert r"[red]x[/red] \x1b[31m :smile:" in capsys.readouterr().out


def test_an_empty_table_says_so_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["GUEST"], [], empty="no guests on host-a")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "no guests on host-a\n")


def test_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts({"a": 1, "longer": "x\ny"})
    assert capsys.readouterr().out == "a       1\nlonger  x\\ny\n"


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=40))
def test_escaped_text_is_always_printable(text: str) -> None:
    assert escaped(text).isprintable()
    assert all(line.isprintable() for line in escaped(text, keep_lines=True).split("\n"))


def test_no_line_of_an_error_can_pass_for_another_error() -> None:
    stream = io.StringIO()
    print_error(SetupRefused("no\nerror: forged\r\x1b[2J"), stream)
    assert stream.getvalue() == "error: no\n  error: forged\\x1b[2J\n".replace("forged", "forged\\r")


def test_a_configuration_shows_all_its_mistakes_indented() -> None:
    stream = io.StringIO()
    print_error(ConfigInvalid(Path("a.toml"), ("x: one", "y: two")), stream)
    assert stream.getvalue() == "error: a.toml: 2 mistakes\n  x: one\n  y: two\n"


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (click.UsageError("x"), Exit.USAGE),
        (QuantityInvalid("x"), Exit.USAGE),
        (ConfigInvalid(Path("x"), ("y",)), Exit.USAGE),
        (click.ClickException("x"), Exit.REFUSED),
        (SetupRefused("x"), Exit.REFUSED),
        (MigrationFailed("x"), Exit.REFUSED),
        (PkiRefused("x"), Exit.REFUSED),
        (JournalCorrupt(Path("x"), 8, "y"), Exit.REFUSED),
        (RequestRefused("host-a", "busy", "x"), Exit.REFUSED),
        (RequestRefused("host-a", "unreachable", "x"), Exit.UNREACHABLE),
        (NotFound("guest", "x", ("host-a",), {}), Exit.REFUSED),
        (NotFound("guest", "x", ("host-a",), {"host-a": "y"}), Exit.UNREACHABLE),
        (Ambiguous("job", "x", ("y", "z"), {}), Exit.REFUSED),
        (HostUnknown("x", ("y",)), Exit.USAGE),
        (InDoubt("x"), Exit.IN_DOUBT),
        (transport_errors.TransportError("x"), Exit.UNREACHABLE),
        (KeyboardInterrupt(), Exit.INTERRUPTED),
        (click.Abort(), Exit.INTERRUPTED),
        (ValueError("x"), None),
        (OSError("x"), None),
    ],
)
def test_each_error_has_its_exit_code(exc: BaseException, code: Exit | None) -> None:
    assert exit_code_of(exc) is code


@pytest.mark.parametrize(
    ("inside", "code"),
    [
        ([SetupRefused("x"), InDoubt("y")], Exit.IN_DOUBT),
        ([InDoubt("y"), KeyboardInterrupt()], Exit.IN_DOUBT),
        ([SetupRefused("x"), KeyboardInterrupt()], Exit.INTERRUPTED),
        ([SetupRefused("x"), ValueError("a bug")], None),
    ],
)
def test_a_group_has_the_code_of_its_gravest_error(inside: list[BaseException], code: Exit | None) -> None:
    group = BaseExceptionGroup("outer", [BaseExceptionGroup("inner", inside)])
    assert exit_code_of(group) is code


def test_each_error_of_a_group_is_printed_but_not_ctrl_c() -> None:
    stream = io.StringIO()
    print_error(
        BaseExceptionGroup("tasks", [SetupRefused("one"), KeyboardInterrupt(), InDoubt("two")]), stream
    )
    assert stream.getvalue() == "error: one\nerror: two\n"
