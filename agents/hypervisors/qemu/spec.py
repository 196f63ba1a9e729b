"""One QEMU machine, declared: what may travel to another host, and what a person writes.

Law: pure, but for reading the file that a person wrote. No path of a socket, no binary and no argument of QEMU's
stands in a spec: each host adds its own (`cmdline`), and says what it allows (`allowed`). A spec may come from a peer:
every field is checked here, whatever it is for, and again there.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from agents.errors import ConfigInvalid, SettingsError
from agents.hypervisors.qemu import netdisks
from agents.hypervisors.qemu.errors import SpecInvalid
from agents.sections import Section, choice, integer, read_toml, size, text, truth
from agents.storageproof.urls import is_remote
from transport.errors import BadMessage, FrameTooLarge
from transport.schema import Schema

__all__ = [
    "KIND",
    "MAX_SPEC_BYTES",
    "Accel",
    "Backend",
    "Bus",
    "Cache",
    "DiskSpec",
    "Format",
    "MemorySpec",
    "NetworkKind",
    "NetworkSpec",
    "QemuSpec",
    "Vga",
    "is_cpu",
]

KIND: Final = "qemu"
# A machine with every list full has some 20 KiB.
MAX_SPEC_BYTES: Final = 64 << 10
MAX_MEMORIES: Final = 16
MAX_DISKS: Final = 64
MAX_NETWORKS: Final = 16
MAX_VCPUS: Final = 1024
MAX_RAM_BYTES: Final = 4 << 40
_MIB: Final = 1 << 20
_PAGE_SIZES: Final = (0, 2 << 20, 1 << 30)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_BLOCK: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
_MACHINE: Final = re.compile(r"pc-(q35|i440fx)-[0-9]{1,2}\.[0-9]{1,2}(\.[0-9]{1,2})?")
# A model and features of it. No `=` and no other comma: nothing but features can be named.
_CPU: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(,[+-][a-z0-9][a-z0-9._-]{0,63}){0,128}")
_MAC: Final = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
# Linux, net/core/dev.c dev_valid_name: 15 characters.
_INTERFACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_MAX_PATH_BYTES: Final = 1024
_MAX_APPEND_BYTES: Final = 2048  # COMMAND_LINE_SIZE of x86 Linux


class Accel(StrEnum):
    """What runs the guest's code. A guest cannot change it when it moves."""

    KVM = "kvm"
    TCG = "tcg"


class Backend(StrEnum):
    """Where a piece of guest RAM lives on its host; always shared, or it could not be mapped."""

    MEMFD = "memfd"
    FILE = "file"


class Bus(StrEnum):
    """What a disk is attached to."""

    VIRTIO = "virtio"
    SCSI = "scsi"


class Format(StrEnum):
    """A disk's format; never guessed, because a guest could then choose it."""

    RAW = "raw"
    QCOW2 = "qcow2"


class Cache(StrEnum):
    """How the host caches a disk. Only the first two are safe on storage whose hosts do not share a cache."""

    NONE = "none"
    DIRECTSYNC = "directsync"
    WRITEBACK = "writeback"


class NetworkKind(StrEnum):
    """What a network card is connected to."""

    USER = "user"
    BRIDGE = "bridge"
    TAP = "tap"


class Vga(StrEnum):
    """The display's card."""

    NONE = "none"
    STD = "std"
    VIRTIO = "virtio"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpec:
    """One backend of RAM, a block of this `name` in QEMU.

    `page_bytes` 0 is ordinary pages; `node` is the guest's NUMA node, or -1 for a machine without.
    """

    name: str
    size_bytes: int
    backend: Backend = Backend.MEMFD
    page_bytes: int = 0
    node: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    """One disk. `path`, or the URL of a network disk in its place, is the same on every host."""

    path: str
    format: Format
    bus: Bus = Bus.VIRTIO
    cache: Cache = Cache.NONE
    is_read_only: bool = False

    @property
    def block_driver(self) -> str:
        """QEMU's driver for what is at the path. It has one for files and one for devices, and takes neither for the
        other; the name decides, because it is the same on every host. In /dev/shm are files."""
        if is_remote(self.path):
            return self.path.partition(":")[0]
        is_device = self.path.startswith("/dev/") and not self.path.startswith("/dev/shm/")
        return "host_device" if is_device else "file"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """One network card. `interface` is the bridge or the tap, and empty for `user`."""

    kind: NetworkKind
    mac: str
    interface: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuSpec:
    """One machine.

    Raises:
        SpecInvalid: theirs; with every mistake.
    """

    guest_id: str
    name: str
    machine: str
    accel: Accel
    cpu: str
    vcpus: int
    memories: tuple[MemorySpec, ...]
    disks: tuple[DiskSpec, ...] = ()
    networks: tuple[NetworkSpec, ...] = ()
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    vga: Vga = Vga.NONE
    has_balloon: bool = False
    has_rng: bool = False

    def __post_init__(self) -> None:
        if problems := tuple(_problems(self)):
            raise SpecInvalid(problems)

    @property
    def ram_bytes(self) -> int:
        return sum(memory.size_bytes for memory in self.memories)

    @property
    def cpu_model(self) -> str:
        """The model's name without features."""
        return self.cpu.partition(",")[0]

    def to_bytes(self) -> bytes:
        """Give the wire form; equal specs give equal bytes."""
        return _SCHEMA.encode(self)

    @classmethod
    def from_bytes(cls, wire: bytes) -> QemuSpec:
        """Read what `to_bytes` wrote.

        Raises:
            SpecInvalid: theirs: anything else.
        """
        if len(wire) > MAX_SPEC_BYTES:
            raise SpecInvalid((f"it has {len(wire)} bytes, and {MAX_SPEC_BYTES} are the most",))
        try:
            spec = _SCHEMA.decode(wire)
        except (BadMessage, FrameTooLarge) as exc:
            raise SpecInvalid((f"{exc}; are the agents on both hosts of the same release?",)) from exc
        if not isinstance(spec, cls):
            raise SpecInvalid(("it describes something else",))
        return spec

    @classmethod
    def from_toml(cls, path: Path) -> QemuSpec:
        """Read a guest's description as a person writes it (docs/qemu.md); a missing `id` gets a new one.

        Raises:
            SpecInvalid: the author's: with every mistake, named by key.
        """
        try:
            table = read_toml(path)
        except ConfigInvalid as exc:
            raise SpecInvalid(exc.problems) from exc
        problems: list[str] = []
        root = Section(table, "", problems)
        base = path.absolute().parent
        root.optional("kind", text, KIND)
        values: dict[str, object] = {
            "guest_id": root.optional("id", text, str(uuid.uuid4())),
            "name": root.optional("name", text, path.stem),
            "machine": root.required("machine", text, "pc-q35-0.0"),
            "accel": root.optional("accel", choice(Accel), Accel.KVM),
            "cpu": root.required("cpu", text, "placeholder"),
            "vcpus": root.optional("vcpus", integer(1, MAX_VCPUS), 1),
            "memories": _read_memories(root),
            "disks": tuple(_read_disk(one, base) for one in root.tables("disks")),
            "networks": tuple(_read_network(one) for one in root.tables("networks")),
            "kernel": root.optional("kernel", _file_below(base), ""),
            "initrd": root.optional("initrd", _file_below(base), ""),
            "append": root.optional("append", text, ""),
            "vga": root.optional("vga", choice(Vga), Vga.NONE),
            "has_balloon": root.optional("balloon", truth, False),
            "has_rng": root.optional("rng", truth, False),
        }
        root.finish()
        if problems:
            raise SpecInvalid(tuple(problems))
        return cls(**values)  # type: ignore[arg-type]  # each was read by a parser of its type


_SCHEMA: Final = Schema(QemuSpec)


def _read_memories(root: Section) -> tuple[MemorySpec, ...]:
    """`memory = "2GiB"`, or a table [[memory]] for each backend."""
    if not root.is_list("memory"):
        return (MemorySpec(name="ram0", size_bytes=root.required("memory", size(_MIB, MAX_RAM_BYTES), _MIB)),)
    memories = []
    for number, section in enumerate(root.tables("memory")):
        memories.append(
            MemorySpec(
                name=f"ram{number}",
                size_bytes=section.required("size", size(_MIB, MAX_RAM_BYTES), _MIB),
                backend=section.optional("backend", choice(Backend), Backend.MEMFD),
                page_bytes=section.optional("page_size", size(2 << 20, 1 << 30), 0),
                node=section.optional("node", integer(0, MAX_MEMORIES - 1), -1),
            )
        )
        section.finish()
    return tuple(memories)


def _read_disk(section: Section, base: Path) -> DiskSpec:
    disk = DiskSpec(
        path=section.required("path", _file_below(base), "/"),
        format=section.required("format", choice(Format), Format.RAW),
        bus=section.optional("bus", choice(Bus), Bus.VIRTIO),
        cache=section.optional("cache", choice(Cache), Cache.NONE),
        is_read_only=section.optional("read_only", truth, False),
    )
    section.finish()
    return disk


def _read_network(section: Section) -> NetworkSpec:
    kinds = [kind for kind in NetworkKind if kind in section]
    if len(kinds) != 1:
        section.note("bridge", 'give one of bridge = "br0", tap = "tap0" or user = true')
    kind = kinds[0] if kinds else NetworkKind.USER
    interface = "" if kind is NetworkKind.USER else section.required(str(kind), text, "none")
    if kind is NetworkKind.USER:
        section.optional(str(kind), truth, True)
    network = NetworkSpec(
        kind=kind, mac=section.required("mac", text, "52:54:00:00:00:00"), interface=interface
    )
    section.finish()
    return network


class _FileBelow:
    """Reads a path; a relative one starts at the folder of the description. A URL is left as it is."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def __call__(self, value: object) -> str:
        words = text(value)
        if is_remote(words):
            return words
        if "\0" in words:
            raise SettingsError("a path has no NUL character")
        return str(self._base / words)


def _file_below(base: Path) -> _FileBelow:
    return _FileBelow(base)


# ---------------------------------------------------------------------- checks


def is_cpu(words: str) -> bool:
    """Whether these are a model and features of it, and nothing else."""
    return _CPU.fullmatch(words) is not None


def _problems(spec: QemuSpec) -> Iterator[str]:
    if not _is_canonical_uuid(spec.guest_id):
        yield "id: not a UUID in small letters, such as 3f0f4c6e-8f0b-4f57-9d0d-5a3c7c1b2a10"
    if not _NAME.fullmatch(spec.name):
        yield "name: needs 1 to 63 letters, digits, dots, dashes, underscores, a letter or digit first"
    if not _MACHINE.fullmatch(spec.machine):
        yield (
            f"machine: {spec.machine!r:.60} is no versioned machine type of a PC, such as pc-q35-7.2 "
            "(q35 and pc mean another machine with each release of QEMU)"
        )
    if not is_cpu(spec.cpu):
        yield f"cpu: {spec.cpu!r:.80} is not a model with features, such as Nehalem or Skylake-Server,+pcid,-hle"
    if not 1 <= spec.vcpus <= MAX_VCPUS:
        yield f"vcpus: {spec.vcpus} is not between 1 and {MAX_VCPUS}"
    yield from _memory_problems(spec)
    yield from _disk_problems(spec.disks)
    yield from _network_problems(spec.networks)
    for key, path in (("kernel", spec.kernel), ("initrd", spec.initrd)):
        if path and not _is_usable_path(path):
            yield f"{key}: not an absolute path of at most {_MAX_PATH_BYTES} bytes without commas"
    if (spec.initrd or spec.append) and not spec.kernel:
        yield "kernel: is missing, and initrd or append need it"
    if len(spec.append.encode(errors="replace")) > _MAX_APPEND_BYTES or not spec.append.isprintable():
        yield f"append: must be printable and of at most {_MAX_APPEND_BYTES} bytes"


def _memory_problems(spec: QemuSpec) -> Iterator[str]:
    memories = spec.memories
    if not 1 <= len(memories) <= MAX_MEMORIES:
        yield f"memory: a machine has 1 to {MAX_MEMORIES} backends, not {len(memories)}"
    if len({memory.name for memory in memories}) != len(memories):
        yield "memory: two backends have the same name"
    for memory in memories:
        if not _BLOCK.fullmatch(memory.name):
            yield f"memory.name: {memory.name!r:.40} is not 1 to 63 letters, digits, dots, dashes, underscores"
        if memory.page_bytes not in _PAGE_SIZES:
            yield f"memory.page_size: {memory.page_bytes} is not 2MiB or 1GiB"
        if memory.page_bytes and memory.backend is Backend.FILE:
            yield "memory.backend: huge pages need the memfd backend"
        unit = max(memory.page_bytes, _MIB)
        if not unit <= memory.size_bytes <= MAX_RAM_BYTES or memory.size_bytes % unit:
            yield f"memory.size: {memory.size_bytes} is not a multiple of {unit} up to {MAX_RAM_BYTES}"
    if spec.ram_bytes > MAX_RAM_BYTES:
        yield f"memory: {spec.ram_bytes} bytes in all are more than {MAX_RAM_BYTES}"
    nodes = [memory.node for memory in memories]
    if len(memories) == 1 and nodes[0] == -1:
        return
    if sorted(nodes) != list(range(len(nodes))):
        yield "memory.node: several backends are the guest's NUMA nodes 0, 1, ...: give each its own"


def _disk_problems(disks: tuple[DiskSpec, ...]) -> Iterator[str]:
    if len(disks) > MAX_DISKS:
        yield f"disks: at most {MAX_DISKS}, not {len(disks)}"
    for disk in disks:
        if is_remote(disk.path):
            if problem := netdisks.problem_of(disk.path, is_read_only=disk.is_read_only):
                yield f"disks.path: {problem}"
        elif not _is_usable_path(disk.path):
            yield (
                f"disks.path: {disk.path!r:.80} is not an absolute path of at most {_MAX_PATH_BYTES} bytes "
                "without commas"
            )
    if len({disk.path for disk in disks}) != len(disks):
        yield "disks.path: two disks have the same one"


def _network_problems(networks: tuple[NetworkSpec, ...]) -> Iterator[str]:
    if len(networks) > MAX_NETWORKS:
        yield f"networks: at most {MAX_NETWORKS}, not {len(networks)}"
    for network in networks:
        if not _MAC.fullmatch(network.mac):
            yield (
                f"networks.mac: {network.mac!r:.40} is no address of one card in small letters, such as "
                "52:54:00:12:34:56"
            )
        if network.kind is NetworkKind.USER:
            if network.interface:
                yield "networks: user networking has no interface"
        elif not _INTERFACE.fullmatch(network.interface):
            yield f"networks.{network.kind}: {network.interface!r:.40} is no name of an interface"
    if len({network.mac for network in networks}) != len(networks):
        yield "networks.mac: two cards have the same one"


def _is_canonical_uuid(words: str) -> bool:
    try:
        return str(uuid.UUID(words)) == words and uuid.UUID(words).int != 0
    except ValueError:
        return False


def _is_usable_path(path: str) -> bool:
    # A comma would end the value in QEMU's option syntax; doubling it is possible, and not worth a mistake.
    if not path.startswith("/") or "\0" in path or "," in path or not path.isprintable():
        return False
    return len(path.encode(errors="replace")) <= _MAX_PATH_BYTES and ".." not in path.split("/")
