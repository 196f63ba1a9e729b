"""Targets of what describes guests and what stands in /proc; of digests and of device state.

Law: nothing is started and no real process is looked into: /proc is a folder of the test's own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Final

import numpy as np

from agents.hypervisors.embedded.errors import SpecInvalid as EmbeddedSpecInvalid
from agents.hypervisors.embedded.spec import EmbeddedSpec
from agents.hypervisors.hostmemory import free_memory_bytes
from agents.hypervisors.qemu.adopt import spec_of
from agents.hypervisors.qemu.cmdline import HostPaths, argv_of
from agents.hypervisors.qemu.describe import cpu_of_properties, features_of_expansion
from agents.hypervisors.qemu.errors import NotAdoptable, QmpFailed, SpecInvalid
from agents.hypervisors.qemu.processmap import mappings_in
from agents.hypervisors.qemu.qmp import event_time_s, field_of
from agents.hypervisors.qemu.spec import QemuSpec
from memory.digest import GROUP_PAGES, RamDigest
from memory.runs import expand
from migrate.cpunames import canonical_all
from migrate.devicestate import STATE_PART_BYTES, StagedState, StateInvalid, pack_into, unpack
from tests.agents.hypervisors.qemu.conftest import PLAIN, RICH
from tests.fuzz.drawing import Draw
from tests.fuzz.target import KIB, MIB, Target, law

__all__ = ["TARGETS"]

_FOLDER: Final = tempfile.TemporaryDirectory(prefix="vmferry-fuzz-")
_FILE: Final = Path(_FOLDER.name) / "guest.toml"
_HOST: Final = HostPaths(
    **{key: Path(f"/run/{key}") for key in ("binary", "qmp", "monitor", "console", "console_log", "pid")}
)
_EMBEDDED: Final = EmbeddedSpec(
    guest_id=PLAIN.guest_id,
    name="web1",
    ram_bytes=64 << 20,
    working_set_bytes=8 << 20,
    disk_path="/srv/a.img",
)
_DIGEST: Final = RamDigest(5 * GROUP_PAGES - 3, bytes(16))
_MAPS: Final = (
    b"7f0000000000-7f0010000000 rw-s 00000000 00:01 1029  /memfd:memory-backend-memfd (deleted)\n"
    b"7fff0000-7fff1000 rw-p 00000000 00:00 0 [stack]\n"
)


def _fuzz_qemu_spec(data: bytes) -> None:
    spec = QemuSpec.from_bytes(data)
    law(QemuSpec.from_bytes(spec.to_bytes()) == spec, "a spec does not come back")
    law(_is_contained(spec), "a peer's word became an option of QEMU's")


def _is_contained(spec: QemuSpec) -> bool:
    """Whether the arguments have the same options as an honest guest's, and no value that opens another one."""
    argv = argv_of(spec, _HOST, is_incoming=True)
    known = set(argv_of(RICH, _HOST, is_incoming=True)) | {"-numa", "-vga"}
    options = [word for word in argv[1:] if word.startswith("-") and word != spec.append]
    return argv[0] == str(_HOST.binary) and set(options) <= known and not any("\0" in word for word in argv)


def _fuzz_embedded_spec(data: bytes) -> None:
    spec = EmbeddedSpec.from_bytes(data)
    law(EmbeddedSpec.from_bytes(spec.to_bytes()) == spec, "a spec does not come back")


def _fuzz_qemu_toml(data: bytes) -> None:
    _FILE.write_bytes(data)
    QemuSpec.from_toml(_FILE)


def _fuzz_embedded_toml(data: bytes) -> None:
    _FILE.write_bytes(data)
    EmbeddedSpec.from_toml(_FILE)


def _fuzz_arguments(data: bytes) -> None:
    spec_of([word.decode(errors="surrogateescape") for word in data.split(b"\0")])


def _fuzz_maps(data: bytes) -> None:
    """A process that chooses the name of a file that it maps."""
    name = data.translate(None, b"\0").replace(b"\n", b"\\012")
    found = list(mappings_in(_MAPS[:-1].split(b"\n")[0] + name + b"\n" + _MAPS))
    law(len(found) == 3, "a name of a file became a mapping")
    law(all(one.start < one.end for one in found), "a mapping that ends before it starts")


def _fuzz_host_memory(data: bytes) -> None:
    """A cgroup that is named by somebody else."""
    folder = Path(_FOLDER.name)
    (folder / "meminfo").write_bytes(b"MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    (folder / "cgroup").write_bytes(b"0::/" + data.translate(None, b"\0\n") + b"\n")
    free = free_memory_bytes(folder / "meminfo", folder / "cgroup", folder / "sys")
    law(0 <= free <= 1000 << 10, "more memory than there is")


def _fuzz_differing(data: bytes) -> None:
    """A destination that names groups and gives hashes as it likes."""
    draw = Draw(data)
    groups = tuple(draw.byte() - 2 for _ in range(draw.byte() % 8))
    size = draw.pick((0, 1, GROUP_PAGES, 2 * GROUP_PAGES, 4 * GROUP_PAGES, 5 * GROUP_PAGES - 3)) * 8
    filler = bytes([draw.byte()])
    gfns = expand(_DIGEST.differing_in_groups(groups, filler * size))
    law(not len(gfns) or int(gfns.max()) < _DIGEST.page_hashes.size, "a page beyond the guest's RAM")
    law(bool(np.all(np.diff(gfns) > 0)), "pages are not in order, or one is named twice")


def _fuzz_state(data: bytes) -> None:
    offset, part = unpack(memoryview(data))
    law(0 < len(part) <= STATE_PART_BYTES, "a part beyond its limit")
    staged = StagedState()
    staged.add(memoryview(data))
    if offset == 0:
        law(staged.whole(len(part)) == part, "a state that is not its part")


def _state_seeds() -> tuple[bytes, ...]:
    out, seeds = memoryview(bytearray(64 * KIB)), []
    for part, is_slow in ((b"state", False), (b"state" * 8000, True)):
        seeds.append(bytes(out[: pack_into(out, part, 0, is_link_slow=is_slow)]))
    return tuple(seeds)


def _fuzz_cpu_facts(data: bytes) -> None:
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return  # `qmp-line` has that
    features = features_of_expansion(said)
    law(features == canonical_all(features), "features of two spellings, or out of order")
    cpu = cpu_of_properties("m", features, field_of(said, "model", "props"))
    numbers = (cpu.family, cpu.number, cpu.stepping, cpu.level, cpu.xlevel)
    law(all(0 <= number < 1 << 32 for number in numbers), "a register of more than 32 bits")
    law(len(cpu.vendor) <= 12, "a maker's name that CPUID cannot give")


def _fuzz_event_time(data: bytes) -> None:
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(said, dict):
        law(isinstance(event_time_s(said), int | float), "a time that is no number")


TARGETS: Final = (
    Target(
        name="qemu-spec",
        law="a spec that gives known options only, or SpecInvalid",
        fuzz=_fuzz_qemu_spec,
        allowed=(SpecInvalid,),
        seeds=lambda: (PLAIN.to_bytes(), RICH.to_bytes()),
    ),
    Target(
        name="embedded-spec",
        law="a spec, or SpecInvalid",
        fuzz=_fuzz_embedded_spec,
        allowed=(EmbeddedSpecInvalid,),
        seeds=lambda: (_EMBEDDED.to_bytes(),),
    ),
    Target(
        name="qemu-toml",
        law="a spec, or SpecInvalid",
        fuzz=_fuzz_qemu_toml,
        allowed=(SpecInvalid,),
        seeds=lambda: (
            b'machine = "pc-q35-7.2"\ncpu = "max"\nmemory = "1GiB"\n[[disks]]\npath = "a"\nformat = "raw"\n',
        ),
    ),
    Target(
        name="embedded-toml",
        law="a spec, or SpecInvalid",
        fuzz=_fuzz_embedded_toml,
        allowed=(EmbeddedSpecInvalid,),
        seeds=lambda: (b'ram = "64MiB"\nseed = 7\ndirty_rate = "1MiB/s"\n',),
    ),
    Target(
        name="qemu-arguments",
        law="a spec, or NotAdoptable",
        fuzz=_fuzz_arguments,
        allowed=(NotAdoptable, SpecInvalid),
        seeds=lambda: tuple(
            "\0".join(argv_of(spec, _HOST, is_incoming=False)).encode() for spec in (PLAIN, RICH)
        ),
    ),
    Target(
        name="proc-maps",
        law="as many mappings as the kernel gives, whatever a file's name is",
        fuzz=_fuzz_maps,
        allowed=(),
        seeds=lambda: (b" /dev/shm/ram", b" (deleted)"),
    ),
    Target(
        name="host-memory",
        law="no more memory than the kernel says",
        fuzz=_fuzz_host_memory,
        allowed=(),
        seeds=lambda: (b"a/b", b"../..", b"a\rb"),
        most_input_bytes=512,
    ),
    Target(
        name="compared-groups",
        law="pages within the guest, in order, each once; or ValueError",
        fuzz=_fuzz_differing,
        allowed=(ValueError,),
        seeds=lambda: (b"\1\2\2\1", b"\2\2\3\3\1", b"\2\2\2\3\1", b"\2\6\2\3\1"),
        most_input_bytes=64,
    ),
    Target(
        name="device-state",
        law="a part of at most 1 MiB, or StateInvalid",
        fuzz=_fuzz_state,
        allowed=(StateInvalid,),
        seeds=_state_seeds,
        most_input_bytes=64 * KIB,
        most_allocated_bytes=6 * MIB,
    ),
    Target(
        name="cpu-facts",
        law="names of features, or QmpFailed",
        fuzz=_fuzz_cpu_facts,
        allowed=(QmpFailed,),
        seeds=lambda: (
            b'{"model": {"name": "max", "props": {"sse4-2": true, "hle": false, "family": 6, "vendor": "A"}}}',
        ),
    ),
    Target(
        name="event-time",
        law="a number, or QmpFailed",
        fuzz=_fuzz_event_time,
        allowed=(QmpFailed,),
        seeds=lambda: (b'{"timestamp": {"seconds": 1, "microseconds": 2}}',),
    ),
)
