"""One line an event: `time level event key=value ...`, or the same as a JSON object.

Law: text that came from a peer, a guest or a file never begins a line, never ends one and never drives a
terminal: values are quoted and escaped to ASCII, and cut at MAX_VALUE_CHARS. Transitions and decisions are
logged once, where they are made; pages are not logged.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Final, TextIO

__all__ = ["configure_logs", "get_logger", "log_event"]

# A sentence with its cause fits; a peer that sends a megabyte of it does not fill the disk.
MAX_VALUE_CHARS: Final = 1000
# A traceback of ours, all of it.
MAX_TRACE_CHARS: Final = 16_000
_PLAIN_VALUE: Final = re.compile(r"[A-Za-z0-9_.:/@%+,-]+", re.ASCII)
_PLAIN_EVENT: Final = re.compile(r"[A-Za-z0-9_.:/@%+, -]+", re.ASCII)
_KEY: Final = re.compile(r"[^A-Za-z0-9_]", re.ASCII)
_FIELDS: Final = "vmferry_fields"


def get_logger(name: str) -> logging.Logger:
    """Give the logger of a module; pass `__name__`."""
    return logging.getLogger(name)


def log_event(logger: logging.Logger, level: int, event: str, /, **fields: object) -> None:
    """Log that something happened, with its facts in the order given.

    `event` is a constant of ours, a few words, the same every time; whatever changes is a field.
    """
    if logger.isEnabledFor(level):
        logger.log(level, "%s", event, extra={_FIELDS: fields})


def configure_logs(level: str = "info", *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Write all of the process's log lines to `stream` (stderr) from now on. May be called again."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Its debug lines are one for every call of the event loop.
    logging.getLogger("asyncio").setLevel(max(logging.INFO, root.level))


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z info migration phase job=j-1 old=precopy new=stop`"""

    def format(self, record: logging.LogRecord) -> str:
        event = record.getMessage()
        words = [
            _time(record),
            record.levelname.lower(),
            event if _PLAIN_EVENT.fullmatch(event) else _quoted(event, MAX_VALUE_CHARS),
        ]
        words += [f"{_KEY.sub('_', key)}={_text(value)}" for key, value in _fields(record).items()]
        if record.exc_info:
            words.append(f"trace={_quoted(self.formatException(record.exc_info), MAX_TRACE_CHARS)}")
        return " ".join(words)


class JsonFormatter(logging.Formatter):
    """`{"time": ..., "level": ..., "logger": ..., "event": ..., FIELDS}`; a field cannot replace those four."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {key: _json_value(value) for key, value in _fields(record).items()}
        line |= {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _cut(record.getMessage(), MAX_VALUE_CHARS),
        }
        if record.exc_info:
            line["trace"] = _cut(self.formatException(record.exc_info), MAX_TRACE_CHARS)
        return _escaped(line)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, _FIELDS, {})
    return fields


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _text(value: object) -> str:
    words = _plain(value)
    return (
        words
        if _PLAIN_VALUE.fullmatch(words) and len(words) <= MAX_VALUE_CHARS
        else _quoted(words, MAX_VALUE_CHARS)
    )


def _json_value(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        # JSON has no word for infinity, and readers refuse Python's.
        return value if abs(value) < float("inf") else str(value)
    return _cut(_plain(value), MAX_VALUE_CHARS)


def _plain(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:.6g}"
        case bytes():
            return value.hex()
        case _:
            return str(value)


def _quoted(words: str, max_chars: int) -> str:
    return _escaped(_cut(words, max_chars))


def _escaped(value: object) -> str:
    # json escapes all control characters but DEL.
    return json.dumps(value).replace("\x7f", "\\u007f")


def _cut(words: str, max_chars: int) -> str:
    return words if len(words) <= max_chars else f"{words[:max_chars]}... ({len(words)} characters)"
