from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import logs
from agents.logs import JsonFormatter, TextFormatter, configure_logs, get_logger, log_event


@pytest.fixture
def untouched_root() -> Iterator[None]:
    root, loop = logging.getLogger(), logging.getLogger("asyncio")
    before = root.handlers[:], root.level, loop.level
    yield
    root.handlers[:], level, loop_level = before
    root.setLevel(level)
    loop.setLevel(loop_level)


def record(event: str, fields: dict[str, object]) -> logging.LogRecord:
    made = logging.LogRecord("agents.host", logging.INFO, __file__, 1, "%s", (event,), None)
    made.created = 1767323045.678
    setattr(made, logs._FIELDS, fields)
    return made


def test_a_line_reads_as_time_level_event_and_facts() -> None:
    fields: dict[str, object] = {"job": "j-1", "because": "budget met", "downtime_s": 0.00631, "live": True}
    assert TextFormatter().format(record("migration phase", fields)) == (
        '2026-01-02T03:04:05.678Z info migration phase job=j-1 because="budget met" downtime_s=0.00631 live=true'
    )


def test_a_json_line_has_the_same_facts() -> None:
    fields: dict[str, object] = {"job": "j-1", "digest": b"\x01\xff", "rate": float("inf"), "event": "forged"}
    assert json.loads(JsonFormatter().format(record("migration phase", fields))) == {
        "time": "2026-01-02T03:04:05.678Z",
        "level": "info",
        "logger": "agents.host",
        "event": "migration phase",
        "job": "j-1",
        "digest": "01ff",
        "rate": "inf",
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "none"),
        (b"\x00\xff", "00ff"),
        ("", '""'),
        ('a"b', r'"a\"b"'),
        ("a=b", '"a=b"'),
        ("\x7f", '"\\u007f"'),
    ],
)
def test_values_are_quoted_where_they_could_be_misread(value: object, shown: str) -> None:
    assert TextFormatter().format(record("x", {"key": value})).endswith(f" key={shown}")


def test_a_long_value_is_cut_one_past_the_limit() -> None:
    exactly = TextFormatter().format(record("x", {"key": "y" * logs.MAX_VALUE_CHARS}))
    over = TextFormatter().format(record("x", {"key": "y" * (logs.MAX_VALUE_CHARS + 1)}))
    assert exactly.endswith("y")
    assert over.endswith('y... (1001 characters)"')


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=50), st.text(max_size=50), st.text(min_size=1, max_size=10))
def test_no_text_can_make_a_second_line_or_reach_the_terminal(event: str, value: str, key: str) -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record(event, {key: value}))
        assert re.fullmatch(r"[\x20-\x7e]*", line) is not None


def test_an_exception_stays_on_its_line() -> None:
    made = record("task failed", {})
    try:
        raise ValueError("first\nsecond")
    except ValueError as exc:
        made.exc_info = (ValueError, exc, exc.__traceback__)
    line = TextFormatter().format(made)
    assert "\n" not in line
    assert r"first\nsecond" in line
    assert "trace" in json.loads(JsonFormatter().format(made))


@pytest.mark.usefixtures("untouched_root")
def test_configured_logs_show_their_level_and_above() -> None:
    stream = io.StringIO()
    configure_logs("warning", stream=stream)
    log_event(get_logger("agents.x"), logging.INFO, "quiet")
    log_event(get_logger("agents.x"), logging.WARNING, "loud", level="a field may have any name", event="too")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert 'warning loud level="a field may have any name" event=too' in lines[0]


@pytest.mark.usefixtures("untouched_root")
def test_lines_of_libraries_are_escaped_too() -> None:
    stream = io.StringIO()
    configure_logs("info", as_json=True, stream=stream)
    logging.getLogger("library").warning("peer said %s", "a\nb")
    assert json.loads(stream.getvalue())["event"] == "peer said a\nb"
    assert len(stream.getvalue().splitlines()) == 1
