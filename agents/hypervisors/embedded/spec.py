"""What an embedded guest is made of: the description that travels to the destination.

Law: pure but for `from_toml`, which reads one file. A spec that exists is valid: every mistake is found when it
is made, all at once. `from_bytes` reads what a peer sent.
"""

from __future__ import annotations

import re
import tomllib
import uuid
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgpack

from agents.errors import QuantityInvalid
from agents.hypervisors.embedded.errors import SpecInvalid
from agents.units import parse_rate, parse_size

__all__ = [
    "FIRST_FREE_BYTE",
    "MAX_DIRTY_BYTES_PER_S",
    "MAX_RAM_BYTES",
    "MAX_SPEC_BYTES",
    "MAX_STATE_BYTES",
    "MIN_RAM_BYTES",
    "PAGE_BYTES",
    "CPU_MODELS",
    "Content",
    "EmbeddedSpec",
    "Pattern",
]

PAGE_BYTES: Final = 4096
# Below this address are the program, its parameters, its counters and its disk buffers; the working set and
# the content that is there from boot begin here.
FIRST_FREE_BYTE: Final = 0x10000
MIN_RAM_BYTES: Final = 1 << 20
# A bitmap of 64 GiB is 2 MiB, which still is one reply on the control socket (write-hook tracking).
MAX_RAM_BYTES: Final = 64 << 30
# Two cores of today emulate about 30 M instructions/s each: beyond 1-2 GiB/s no rate is reached anyway.
MAX_DIRTY_BYTES_PER_S: Final = 4 << 30
# A spec is a dozen short fields; the longest is a path of at most PATH_MAX bytes.
MAX_SPEC_BYTES: Final = 8192
# Device state is about 2.5 KiB, of which 1 KiB is the console's tail.
MAX_STATE_BYTES: Final = 16384
_MAX_PATH_BYTES: Final = 4095
_MAX_INSTRUCTIONS: Final = 1 << 62
_VERSION: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)

# QEMU's names of the 64-bit models that unicorn has, and unicorn's numbers (UC_CPU_X86_*, kept as numbers so
# that reading a spec does not load the emulator; a test compares them with the package).
CPU_MODELS: Final = MappingProxyType(
    {
        "qemu64": 0,
        "phenom": 1,
        "core2duo": 2,
        "kvm64": 3,
        "Conroe": 13,
        "Penryn": 14,
        "Nehalem": 15,
        "Westmere": 16,
        "SandyBridge": 17,
        "IvyBridge": 18,
        "Haswell": 19,
        "Broadwell": 20,
        "Skylake-Client": 21,
        "Skylake-Server": 22,
        "Cascadelake-Server": 23,
        "Cooperlake": 24,
        "Icelake-Client": 25,
        "Icelake-Server": 26,
        "Denverton": 27,
        "Snowridge": 28,
        "KnightsMill": 29,
        "Opteron_G1": 30,
        "Opteron_G2": 31,
        "Opteron_G3": 32,
        "Opteron_G4": 33,
        "Opteron_G5": 34,
        "EPYC": 35,
        "Dhyana": 36,
        "EPYC-Rome": 37,
    }
)


class Pattern(StrEnum):
    """Which page the program writes next."""

    HOT = "hot"  # 90 % of the writes go to 10 % of the pages
    RANDOM = "random"
    SEQUENTIAL = "sequential"
    IDLE = "idle"  # none: it counts and gives heartbeats


class Content(StrEnum):
    """What it writes, and what its RAM holds from boot."""

    COMPRESSIBLE = "compressible"
    INCOMPRESSIBLE = "incompressible"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedSpec:
    """One machine and its workload.

    `fill_bytes` of RAM from FIRST_FREE_BYTE on are not zero from boot on, made from `seed`. `disk_path` is the
    same file on every host. `max_instructions` stops the guest at exactly that count, for ever.

    Raises:
        SpecInvalid: theirs; with every mistake.
    """

    guest_id: str
    name: str
    ram_bytes: int
    cpu_model: str = "Haswell"
    pattern: Pattern = Pattern.HOT
    dirty_bytes_per_s: int = 20 << 20
    working_set_bytes: int
    content: Content = Content.COMPRESSIBLE
    fill_bytes: int = 0
    seed: int = 1
    disk_path: str | None = None
    max_instructions: int | None = None

    def __post_init__(self) -> None:
        problems = tuple(_problems(self))
        if problems:
            raise SpecInvalid(problems)

    def to_bytes(self) -> bytes:
        """Give the wire form; equal specs give equal bytes."""
        body = {
            key: str(value) if isinstance(value, StrEnum) else value for key, value in asdict(self).items()
        }
        packed: bytes = msgpack.packb({"version": _VERSION, **body})
        return packed

    @classmethod
    def from_bytes(cls, wire: bytes) -> EmbeddedSpec:
        """Read what `to_bytes` wrote.

        Raises:
            SpecInvalid: theirs: anything else.
        """
        if len(wire) > MAX_SPEC_BYTES:
            raise SpecInvalid((f"it has {len(wire)} bytes, and {MAX_SPEC_BYTES} are the most",))
        try:
            body = msgpack.unpackb(wire)
        except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as exc:
            raise SpecInvalid((f"it is not msgpack ({type(exc).__name__})",)) from exc
        if not isinstance(body, dict) or body.get("version") != _VERSION:
            raise SpecInvalid((f"it is not a spec of version {_VERSION}; update the agents on both hosts",))
        values = {key: value for key, value in body.items() if key != "version"}
        wanted = {field.name for field in fields(cls)}
        if set(values) != wanted:
            odd = sorted(repr(key)[:40] for key in set(values) ^ wanted)
            raise SpecInvalid((f"unknown or missing keys: {', '.join(odd[:8])}",))
        return cls._of_plain(values)

    @classmethod
    def from_toml(cls, path: Path) -> EmbeddedSpec:
        """Read a guest's description as a person writes it; a missing `id` gets a new one.

        Sizes and rates are written as `agents.units` reads them.

        Raises:
            SpecInvalid: the author's: with every mistake, named by key.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise SpecInvalid((f"{path} cannot be read: {exc.strerror}",)) from exc
        # A number of thousands of digits is a bare ValueError; brackets in brackets are a RecursionError.
        except (ValueError, RecursionError) as exc:
            raise SpecInvalid((f"{path} is not TOML: {exc}",)) from exc
        table.pop("kind", None)  # it was read to find this reader
        problems = [
            f"{key}: unknown key; known are {', '.join(_TOML_KEYS)}" for key in table if key not in _TOML_KEYS
        ]
        values: dict[str, object] = {
            "guest_id": str(uuid.uuid4()),
            "name": path.stem,
            "working_set_bytes": None,
        } | {field.name: field.default for field in fields(cls) if field.name not in _NO_DEFAULT}
        for key, value in table.items():
            if key in _TOML_KEYS:
                try:
                    values[_TOML_KEYS[key]] = _quantity(key, value)
                except QuantityInvalid as exc:
                    problems.append(f"{key}: {exc}")
                    values[_TOML_KEYS[key]] = None
        if "ram" not in table:
            problems.append('ram: missing; it is the guest\'s RAM, for example ram = "64MiB"')
            values["ram_bytes"] = None
        ram_bytes = values["ram_bytes"]
        if values["working_set_bytes"] is None and "working_set" not in table and isinstance(ram_bytes, int):
            values["working_set_bytes"] = max(ram_bytes // 4 // PAGE_BYTES, 1) * PAGE_BYTES
        try:
            spec = cls._of_plain(values)
        except SpecInvalid as exc:
            told = {problem.split(":", 1)[0] for problem in problems}
            by_field = {field: key for key, field in _TOML_KEYS.items()}
            for problem in exc.problems:
                field, _, rest = problem.partition(":")
                key = by_field.get(field, field)
                if key not in told and not (values.get(field) is None and field == "working_set_bytes"):
                    problems.append(f"{key}:{rest}")
            raise SpecInvalid(tuple(problems)) from exc
        if problems:
            raise SpecInvalid(tuple(problems))
        return spec

    @classmethod
    def _of_plain(cls, values: dict[str, object]) -> EmbeddedSpec:
        """Make one from plain values of any type; the dataclass's own check finds wrong ones."""
        plain = dict(values)
        for key, enum in (("pattern", Pattern), ("content", Content)):
            value = plain.get(key)
            if isinstance(value, str) and value in tuple(enum):
                plain[key] = enum(value)
        return cls(**plain)  # type: ignore[arg-type]  # checked by value in __post_init__


_NO_DEFAULT: Final = frozenset({"guest_id", "name", "ram_bytes", "working_set_bytes"})
_TOML_KEYS: Final = MappingProxyType(
    {
        "id": "guest_id",
        "name": "name",
        "ram": "ram_bytes",
        "cpu": "cpu_model",
        "pattern": "pattern",
        "dirty_rate": "dirty_bytes_per_s",
        "working_set": "working_set_bytes",
        "content": "content",
        "fill": "fill_bytes",
        "seed": "seed",
        "disk": "disk_path",
        "max_instructions": "max_instructions",
    }
)


def _quantity(key: str, value: object) -> object:
    if isinstance(value, str) and key in ("ram", "working_set", "fill"):
        return parse_size(value)
    if isinstance(value, str) and key == "dirty_rate":
        return parse_rate(value)
    return value


def _problems(spec: EmbeddedSpec) -> list[str]:
    """Give every mistake; types are checked as well, because the values may be a peer's."""
    problems: list[str] = []
    if not _is_canonical_uuid(spec.guest_id):
        problems.append("guest_id: not a UUID in small letters, such as 3f0f4c6e-8f0b-4f57-9d0d-5a3c7c1b2a10")
    if not isinstance(spec.name, str) or not _NAME.fullmatch(spec.name):
        problems.append(
            "name: needs 1 to 63 letters, digits, dots, dashes, underscores, a letter or digit first"
        )
    if not isinstance(spec.cpu_model, str) or spec.cpu_model not in CPU_MODELS:
        problems.append(f"cpu_model: {spec.cpu_model!r:.40} is not one of {', '.join(CPU_MODELS)}")
    _check_choice(problems, "pattern", spec.pattern, Pattern)
    _check_choice(problems, "content", spec.content, Content)
    ram_is_known = _check_size(problems, "ram_bytes", spec.ram_bytes, MIN_RAM_BYTES, MAX_RAM_BYTES)
    room_bytes = (spec.ram_bytes if ram_is_known else MAX_RAM_BYTES) - FIRST_FREE_BYTE
    _check_size(problems, "working_set_bytes", spec.working_set_bytes, PAGE_BYTES, room_bytes)
    _check_size(problems, "fill_bytes", spec.fill_bytes, 0, room_bytes)
    least_rate = 0 if spec.pattern is Pattern.IDLE else PAGE_BYTES
    _check_int(problems, "dirty_bytes_per_s", spec.dirty_bytes_per_s, least_rate, MAX_DIRTY_BYTES_PER_S)
    _check_int(problems, "seed", spec.seed, 0, (1 << 64) - 1)
    if spec.max_instructions is not None:
        _check_int(problems, "max_instructions", spec.max_instructions, 1, _MAX_INSTRUCTIONS)
    if spec.disk_path is not None and not _is_usable_path(spec.disk_path):
        problems.append(f"disk_path: not an absolute path of at most {_MAX_PATH_BYTES} bytes")
    return problems


def _check_choice(problems: list[str], key: str, value: object, choices: type[StrEnum]) -> None:
    if not isinstance(value, choices):
        problems.append(f"{key}: {value!r:.40} is not one of {', '.join(choices)}")


def _check_int(problems: list[str], key: str, value: object, least: int, most: int) -> bool:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return True
    problems.append(f"{key}: {value!r:.40} is not a number from {least} to {most}")
    return False


def _check_size(problems: list[str], key: str, value: object, least: int, most: int) -> bool:
    if not _check_int(problems, key, value, least, most):
        return False
    if isinstance(value, int) and value % PAGE_BYTES:
        problems.append(f"{key}: {value} is not a multiple of the page size, {PAGE_BYTES}")
        return False
    return True


def _is_canonical_uuid(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _is_usable_path(path: object) -> bool:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        return False
    try:
        return len(path.encode()) <= _MAX_PATH_BYTES
    except UnicodeEncodeError:
        return False
