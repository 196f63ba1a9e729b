"""Models of CPUs that files define: libvirt's CPU map (XML), and the [cpudef] files of RHEL 6's QEMU.

Law: pure, and safe with hostile input: sizes have limits, an XML file may define no entities and have no document type,
a model that comes from another gets its features once. Names of features get their one spelling.

Source: libvirt src/cpu_map/*.xml and docs/formatdomain (cpu); QEMU 0.12, sysconfigs/target/cpus-x86_64.conf.
"""

from __future__ import annotations

import re
import xml.parsers.expat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol

from migrate.cpunames import canonical_all
from migrate.facts import CpuFacts

__all__ = [
    "MAX_DEPTH",
    "MAX_FEATURES",
    "MAX_FILE_BYTES",
    "MAX_MODELS",
    "NAME_OF_CPU",
    "CpuFileInvalid",
    "parse_xml",
    "read_cpu_files",
    "refuse_large",
]

# libvirt's whole map has 115 KiB in 80 files, one model some 2.
MAX_FILE_BYTES: Final = 1 << 20
# libvirt 9 has 62 of x86.
MAX_MODELS: Final = 1000
# The longest of today's models have 130.
MAX_FEATURES: Final = 1000
# Of models that come from models. libvirt's deepest are 4.
MAX_DEPTH: Final = 32
_MAX_NESTED: Final = 16  # elements in elements; the map has 4, a guest's XML 6
NAME_OF_CPU: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_VENDORS: Final = MappingProxyType(
    {"Intel": "GenuineIntel", "AMD": "AuthenticAMD", "Hygon": "HygonGenuine", "Zhaoxin": "  Shanghai  "}
)
_LINE: Final = re.compile(r'\s*([A-Za-z_]+)\s*=\s*(?:"([^"]*)"|(\S+))\s*')
_WORD_LISTS: Final = ("feature_edx", "feature_ecx", "extfeature_edx", "extfeature_ecx")
_MAX_REGISTER: Final = (1 << 32) - 1


class CpuFileInvalid(ValueError):
    """A file that defines no CPU models, or in a way that is not read. The author's."""


@dataclass(slots=True)
class _Definition:
    """One model as it stands in its file."""

    name: str
    base: str = ""
    vendor: str = ""
    numbers: dict[str, int] = field(default_factory=dict)
    features: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)

    def take(self, where: set[str], name: str) -> None:
        if not NAME_OF_CPU.fullmatch(name):
            raise CpuFileInvalid(f"model {self.name}: {name!r:.40} is no name of a feature")
        where.add(name)
        if len(where) > MAX_FEATURES:
            raise CpuFileInvalid(f"model {self.name} has more than {MAX_FEATURES} features")


def read_cpu_files(files: Sequence[tuple[str, bytes]]) -> tuple[CpuFacts, ...]:
    """Give the models that files (name, content) define together, sorted by name.

    A model may come from one in another file. One that is defined twice is what its last definition says.

    Raises:
        CpuFileInvalid: the author's; with the file's name.
    """
    known: dict[str, _Definition] = {}
    for file_name, content in files:
        try:
            for definition in _definitions(content):
                known[definition.name] = definition
        except CpuFileInvalid as exc:
            raise CpuFileInvalid(f"{file_name}: {exc}") from exc
        if len(known) > MAX_MODELS:
            raise CpuFileInvalid(f"{file_name}: more than {MAX_MODELS} models")
    return tuple(_facts(known[name], known) for name in sorted(known))


def _definitions(content: bytes) -> list[_Definition]:
    refuse_large(content)
    return (
        _read_xml(content)
        if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
        else _read_cpudefs(content)
    )


def refuse_large(content: bytes) -> None:
    """Refuse what is larger than any file that is read here. Raises CpuFileInvalid."""
    if len(content) > MAX_FILE_BYTES:
        raise CpuFileInvalid(f"it has {len(content)} bytes, and {MAX_FILE_BYTES} are the most")


def _facts(definition: _Definition, known: Mapping[str, _Definition]) -> CpuFacts:
    chain = [definition]
    while chain[-1].base:
        base = known.get(chain[-1].base)
        if base is None:
            raise CpuFileInvalid(
                f"model {chain[-1].name} comes from {chain[-1].base}, which no file defines; read the whole folder"
            )
        if len(chain) == MAX_DEPTH or any(base is one for one in chain):
            raise CpuFileInvalid(
                f"model {definition.name} comes from itself, or from more than {MAX_DEPTH} others"
            )
        chain.append(base)
    features: set[str] = set()
    numbers: dict[str, int] = {}
    vendor = ""
    for one in reversed(chain):
        features = (features | one.features) - one.removed
        if len(features) > MAX_FEATURES:
            raise CpuFileInvalid(f"model {definition.name} has more than {MAX_FEATURES} features")
        numbers |= one.numbers
        vendor = one.vendor or vendor
    return CpuFacts(
        model=definition.name,
        features=canonical_all(features),
        vendor=vendor,
        family=numbers.get("family", 0),
        number=numbers.get("model", 0),
        stepping=numbers.get("stepping", 0),
        level=numbers.get("level", 0),
        xlevel=numbers.get("xlevel", 0),
    )


# ---------------------------------------------------------------------- libvirt


class _MapReader:
    """Hears the elements of one file of the map. What it does not know it passes over."""

    def __init__(self) -> None:
        self.definitions: list[_Definition] = []
        self._vendors = dict(_VENDORS)
        self._open: _Definition | None = None

    def begin(self, inside: Sequence[str], attributes: dict[str, str]) -> None:
        tag = inside[-1]
        name = attributes.get("name", "")
        if self._open is None:
            if tag == "vendor" and name:
                self._vendors[name] = attributes.get("string", "")[:12]
            elif tag == "model":
                self._begin_model(name)
            return
        match tag:
            case "model":
                self._open.base = name
            case "vendor":
                self._open.vendor = self._vendors.get(name, name)[:12]
            case "signature":
                # The first of several is the oldest.
                for number in ("family", "model"):
                    self._open.numbers.setdefault(number, _number(attributes.get(number, "0")))
            case "feature":
                # One that was removed later stands there for guests of old versions.
                is_removed = attributes.get("removed") == "yes"
                self._open.take(self._open.removed if is_removed else self._open.features, name)

    def end(self, inside: Sequence[str]) -> None:
        if inside[-1] == "model" and "model" not in inside[:-1]:
            self._open = None

    def text(self, inside: Sequence[str], words: str) -> None:
        pass

    def _begin_model(self, name: str) -> None:
        if not NAME_OF_CPU.fullmatch(name):
            raise CpuFileInvalid(f"{name!r:.40} is no name of a model")
        self._open = _Definition(name=name)
        self.definitions.append(self._open)
        if len(self.definitions) > MAX_MODELS:
            raise CpuFileInvalid(f"more than {MAX_MODELS} models")


def _read_xml(content: bytes) -> list[_Definition]:
    reader = _MapReader()
    parse_xml(content, reader)
    return reader.definitions


class XmlReader(Protocol):
    """Hears an XML file. `inside` are the names of the elements that are open, the one that is meant last."""

    def begin(self, inside: Sequence[str], attributes: dict[str, str]) -> None: ...

    def end(self, inside: Sequence[str]) -> None: ...

    def text(self, inside: Sequence[str], words: str) -> None: ...


def parse_xml(content: bytes, reader: XmlReader) -> None:
    """Have an XML file heard. It may define no entities, and nest elements to a limit.

    Raises:
        CpuFileInvalid: the author's.
    """
    inside: list[str] = []
    parser = xml.parsers.expat.ParserCreate()

    def begin_within_limits(tag: str, attributes: dict[str, str]) -> None:
        inside.append(tag)
        if len(inside) > _MAX_NESTED:
            raise CpuFileInvalid(f"elements in more than {_MAX_NESTED} others")
        reader.begin(inside, attributes)

    def end_and_go_up(tag: str) -> None:
        reader.end(inside)
        inside.pop()

    parser.StartElementHandler = begin_within_limits
    parser.EndElementHandler = end_and_go_up
    parser.CharacterDataHandler = lambda words: reader.text(inside, words)
    parser.StartDoctypeDeclHandler = _refuse_doctype
    parser.EntityDeclHandler = _refuse_doctype
    try:
        parser.Parse(content, True)
    except xml.parsers.expat.ExpatError as exc:
        raise CpuFileInvalid(f"not XML: {exc}") from exc
    except (LookupError, ValueError) as exc:
        if isinstance(exc, CpuFileInvalid):
            raise
        raise CpuFileInvalid(f"not XML that is read here: {exc}") from exc


def _refuse_doctype(*_: object) -> None:
    raise CpuFileInvalid("it has a document type or an entity, and libvirt writes none")


# ----------------------------------------------------------------------- RHEL 6


def _read_cpudefs(content: bytes) -> list[_Definition]:
    definitions: list[_Definition] = []
    is_inside = False
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n"), 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        if words.startswith("["):
            is_inside = words == "[cpudef]"
            if is_inside:
                definitions.append(_Definition(name=""))
            if len(definitions) > MAX_MODELS:
                raise CpuFileInvalid(f"more than {MAX_MODELS} models")
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise CpuFileInvalid(f'line {number} is neither [cpudef] nor name = "value"')
        if is_inside:
            _take_line(definitions[-1], match[1], match[2] if match[2] is not None else match[3])
    if not definitions:
        raise CpuFileInvalid("no <model> and no [cpudef] is in it")
    for definition in definitions:
        if not NAME_OF_CPU.fullmatch(definition.name):
            raise CpuFileInvalid(f"{definition.name!r:.40} is no name of a model")
    return definitions


def _take_line(definition: _Definition, key: str, value: str) -> None:
    if key == "name":
        definition.name = value[:80]
    elif key == "vendor":
        definition.vendor = value[:12]
    elif key in ("level", "xlevel", "family", "model", "stepping"):
        definition.numbers[key] = _number(value)
    elif key in _WORD_LISTS:
        for word in value.split():
            # QEMU 0.12 wrote both spellings of a feature into some of its tables: sse4.1|sse4_1.
            definition.take(definition.features, word.partition("|")[0])


def _number(words: str) -> int:
    # Longer than any number of 32 bits; beyond it Python's own limit of digits would be met.
    digits = words.strip()
    try:
        value = int(digits, 0) if len(digits) <= 18 else -1
    except ValueError:
        value = -1
    if not 0 <= value <= _MAX_REGISTER:
        raise CpuFileInvalid(f"{words!r:.40} is no number of 32 bits")
    return value
