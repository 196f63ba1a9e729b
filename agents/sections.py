"""Read tables of a configuration and collect every mistake in them, instead of ending at the first.

Law: knows TOML's types and nothing of vmferry's keys. A `Section` is asked for each key once; what nobody asked
for is a mistake too. A value that is wrong is noted and replaced by a placeholder, so that reading goes on; the
caller builds its settings only when no problem was noted.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeVar

from agents import units
from agents.errors import ConfigInvalid, QuantityInvalid, SettingsError

__all__ = [
    "Endpoint",
    "Section",
    "cap",
    "choice",
    "duration",
    "endpoint",
    "integer",
    "listed",
    "loopback",
    "paths",
    "ratio",
    "read_toml",
    "size",
    "text",
    "truth",
]

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
Parser = Callable[[object], T]

# Ten thousand peers fit; more is not a configuration, and is not fed to a parser.
MAX_FILE_BYTES: Final = 1 << 20
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host name or IP address (without brackets) and a TCP port; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Section:
    """One table of the file. `problems` is shared by all sections of a file; `key` is the full dotted key."""

    def __init__(self, table: dict[str, object], key: str, problems: list[str]) -> None:
        self._table = table
        self._key = key
        self._problems = problems
        self._known: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def note(self, key: str, problem: str) -> None:
        """Note a mistake at `key` of this table."""
        self._problems.append(f"{self._full(key)}: {problem}")

    def required(self, key: str, parse: Parser[T], placeholder: T) -> T:
        """Read a key that must be there. Gives `placeholder` when it is missing or wrong, and notes that."""
        if key not in self._table:
            self._known.add(key)
            self.note(key, "is missing")
            return placeholder
        return self.optional(key, parse, placeholder)

    def optional(self, key: str, parse: Parser[T], default: T) -> T:
        """Read a key that may be there. Gives `default` when it is missing, or wrong, and notes the latter."""
        self._known.add(key)
        if key not in self._table:
            return default
        try:
            return parse(self._table[key])
        except SettingsError as exc:
            self.note(key, str(exc))
            return default

    def section(self, key: str) -> Section:
        """Give a table of this table; an empty one when it is missing or is no table."""
        return Section(self.optional(key, _table, {}), self._full(key), self._problems)

    def sections(self, key: str) -> dict[str, Section]:
        """Give the tables of a table whose keys the operator chose: `[peers.host-b]`."""
        table: dict[str, object] = self.optional(key, _table, {})
        outer = self._full(key)
        named: dict[str, Section] = {}
        for name, value in table.items():
            try:
                named[name] = Section(_table(value), f"{outer}.{name}", self._problems)
            except SettingsError as exc:
                self._problems.append(f"{outer}.{name}: {exc}")
        return named

    def is_list(self, key: str) -> bool:
        """Tell whether a key is an array: for keys that may be one value or several tables."""
        return isinstance(self._table.get(key), list)

    def tables(self, key: str) -> list[Section]:
        """Give the tables of an array of tables: `[[disks]]`."""
        outer = self._full(key)
        nothing: list[object] = []
        found: list[Section] = []
        for number, value in enumerate(self.optional(key, _array, nothing)):
            try:
                found.append(Section(_table(value), f"{outer}[{number}]", self._problems))
            except SettingsError as exc:
                self._problems.append(f"{outer}[{number}]: {exc}")
        return found

    def finish(self) -> None:
        """Note every key that was never asked for. Call when all keys were."""
        for key in self._table:
            if key not in self._known:
                nearest = difflib.get_close_matches(key, self._known, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                self.note(key, f"is not a key that is known here{hint}")

    def _full(self, key: str) -> str:
        return f"{self._key}.{key}" if self._key else key


def read_toml(path: Path) -> dict[str, object]:
    """Read a TOML file.

    Raises:
        ConfigInvalid: it cannot be read or is no TOML; the sentence has the line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigInvalid(path, (f"cannot be read: {exc.strerror}",)) from exc
    if len(content) > MAX_FILE_BYTES:
        raise ConfigInvalid(path, (f"is larger than {MAX_FILE_BYTES} bytes",))
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise ConfigInvalid(path, (f"line {line} is not UTF-8 text",)) from exc
    except ValueError as exc:  # a number of thousands of digits is no TOMLDecodeError
        raise ConfigInvalid(path, (f"not TOML: {exc}",)) from exc
    except RecursionError as exc:
        raise ConfigInvalid(path, ("not a configuration: nested too deeply",)) from exc


def text(value: object) -> str:
    """Read a string that is not empty."""
    if not isinstance(value, str):
        raise SettingsError(f"must be a string, not {_kind(value)}")
    if value == "":
        raise SettingsError("must not be empty")
    return value


def truth(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise SettingsError(f"must be true or false, not {_kind(value)}")
    return value


def integer(at_least: int, at_most: int) -> Parser[int]:
    """Read a whole number between two others, both included."""

    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise SettingsError(f"must be a whole number, not {_kind(value)}")
        if not at_least <= value <= at_most:
            raise SettingsError(f"must be between {at_least} and {at_most}, not {value}")
        return value

    return parse


def ratio(at_least: float, at_most: float) -> Parser[float]:
    """Read a number, with a fraction or without, between two others, both included."""

    def parse(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise SettingsError(f"must be a number, not {_kind(value)}")
        if not at_least <= value <= at_most:  # TOML has nan, which is between no two numbers
            raise SettingsError(f"must be between {at_least:g} and {at_most:g}, not {value}")
        return float(value)

    return parse


def size(at_least: int = 0, at_most: int = units.MAX_BYTES) -> Parser[int]:
    """Read bytes: a string as in `agents.units`, or a plain number of bytes."""

    def parse(value: object) -> int:
        size_bytes = units.parse_size(_quantity(value))
        if not at_least <= size_bytes <= at_most:
            low, high = units.format_size(at_least), units.format_size(at_most)
            raise SettingsError(f"must be between {low} and {high}, not {value}")
        return size_bytes

    return parse


def cap(value: object) -> int | None:
    """Read a cap in bytes per second; 0 is no cap (None)."""
    return units.parse_cap(_quantity(value))


def duration(at_least_s: float, at_most_s: float) -> Parser[float]:
    """Read seconds from a string with a unit."""

    def parse(value: object) -> float:
        duration_s = units.parse_duration(_quantity(value))
        if not at_least_s <= duration_s <= at_most_s:
            low, high = units.format_duration(at_least_s), units.format_duration(at_most_s)
            raise SettingsError(f"must be between {low} and {high}, not {value}")
        return duration_s

    return parse


def choice(options: type[E]) -> Parser[E]:
    """Read one word of an enumeration."""

    def parse(value: object) -> E:
        for option in options:
            if value == option.value:
                return option
        listed = ", ".join(repr(option.value) for option in options)
        raise SettingsError(f"must be one of {listed}, not {value!r}")

    return parse


def endpoint(*, may_be_any_port: bool) -> Parser[Endpoint]:
    """Read `host:port`; an IPv6 address stands in brackets."""

    def parse(value: object) -> Endpoint:
        words = text(value)
        host, colon, port = words.rpartition(":")
        in_brackets = host.startswith("[") and host.endswith("]")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or not _is_host(host, in_brackets):
            raise SettingsError(
                f"{words!r} is not host:port, as in host-b:7700, 192.0.2.7:7700 or [2001:db8::1]:7700"
            )
        number = int(port)
        if number > 65535 or (number == 0 and not may_be_any_port):
            raise SettingsError(f"{words!r} has no port between 1 and 65535")
        return Endpoint(host, number)

    return parse


def loopback(value: object) -> Endpoint:
    """Read an endpoint to listen on that no other host can reach."""
    address = endpoint(may_be_any_port=True)(value)
    if address.host != "localhost":
        try:
            is_loopback = ipaddress.ip_address(address.host).is_loopback
        except ValueError:
            is_loopback = False
        if not is_loopback:
            raise SettingsError(
                f"{address} can be reached by other hosts, and what is served there is not protected; "
                f"use 127.0.0.1:{address.port}"
            )
    return address


def paths(base: Path) -> Parser[Path]:
    """Read a path; a relative one starts at `base`, and `~` is the home directory."""

    def parse(value: object) -> Path:
        words = text(value)
        if "\0" in words:
            raise SettingsError("a path has no NUL character")
        try:
            return base / Path(words).expanduser()
        except RuntimeError as exc:
            raise SettingsError(f"{words!r}: there is no such home directory") from exc

    return parse


def listed(parse: Parser[T]) -> Parser[tuple[T, ...]]:
    """Read an array of what `parse` reads."""

    def parse_all(value: object) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise SettingsError(f"must be an array, not {_kind(value)}")
        return tuple(parse(item) for item in value)

    return parse_all


def _quantity(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise QuantityInvalid(f"must be a string with a unit, not {_kind(value)}")


def _is_host(host: str, in_brackets: bool) -> bool:
    if in_brackets:
        try:
            return ipaddress.ip_address(host).version == 6
        except ValueError:
            return False
    return _HOST.fullmatch(host) is not None


def _table(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise SettingsError(f"must be a table, not {_kind(value)}")
    return value


def _array(value: object) -> list[object]:
    if not isinstance(value, list):
        raise SettingsError(f"must be an array of tables, not {_kind(value)}")
    return value


_KINDS: Final[Iterable[tuple[type, str]]] = (
    (bool, "a boolean"),
    (int, "a number"),
    (float, "a number with a fraction"),
    (str, "a string"),
    (list, "an array"),
    (dict, "a table"),
)


def _kind(value: object) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "a date or time")
