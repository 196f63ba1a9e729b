"""QEMU's arguments, whoever wrote them, as a spec: how a QEMU that somebody else started becomes a guest of ours.

Law: pure. It gives a spec only if `cmdline.argv_of` would make the same machine of it, and names every argument that
stands against it otherwise: what is not understood is never left out. Sockets, logs and other things of one host are
no part of a machine.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from agents.hypervisors.qemu.arguments import Read, bytes_of, fields_of, is_number, nothing_left
from agents.hypervisors.qemu.backends import disk_of, memory_of, network_of
from agents.hypervisors.qemu.cmdline import device_arguments
from agents.hypervisors.qemu.errors import NotAdoptable, SpecInvalid
from agents.hypervisors.qemu.spec import (
    Accel,
    MemorySpec,
    QemuSpec,
    Vga,
)

__all__ = ["MAX_PROBLEMS", "MAX_PROBLEM_CHARS", "spec_of"]

# Options that say nothing of the machine: what this process opens on its own host, and how it was started.
_OF_THE_HOST: Final = frozenset(
    {"chardev", "mon", "qmp", "qmp-pretty", "monitor", "pidfile", "D", "msg", "runas", "sandbox", "incoming"}
)
_FLAGS_OF_THE_HOST: Final = frozenset({"S", "daemonize", "no-user-config"})
_FLAGS: Final = _FLAGS_OF_THE_HOST | {"nodefaults", "enable-kvm"}
# More than a person reads; a command line of 2 MiB could have a million.
MAX_PROBLEMS: Final = 64
# An argument of any length can be in a sentence, and the sentences travel; the types of 20 devices fit, twice.
MAX_PROBLEM_CHARS: Final = 700


def _pairs(argv: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    """Give (option, value); an option without a value has an empty one. What is no pair is noted."""
    at = 1
    while at < len(argv):
        word = argv[at]
        at += 1
        if not _is_option(word):
            problems.append(f"the argument {word!r:.80} is a disk image without an option: use -blockdev")
            continue
        option = word.lstrip("-")
        if option in _FLAGS:
            yield option, ""
        elif at == len(argv):
            problems.append(f"the argument {word} has no value, or no spec has a place for it")
        elif option not in _READERS and option not in _OF_THE_HOST and _is_option(argv[at]):
            # A flag, as it seems: what follows is an argument of its own, and has its own problem.
            problems.append(f"the argument {word} has no place in a guest's spec")
        else:
            yield option, argv[at]
            at += 1


def _is_option(word: str) -> bool:
    return word.startswith("-") and word not in ("-", "--")


# Take the place of what is missing, so that the rest is judged nevertheless.
_STAND_INS: Final[Mapping[str, object]] = {
    "guest_id": "00000000-0000-4000-8000-000000000000",
    "name": "unnamed",
    "machine": "pc-q35-7.2",
    "cpu": "max",
    "memories": (MemorySpec(name="ram0", size_bytes=1 << 30),),
}


def spec_of(argv: Sequence[str]) -> QemuSpec:
    """Give the spec of a machine that runs with these arguments.

    Raises:
        NotAdoptable: arguments have no place in a spec; a sentence names each of them.
    """
    read = Read()
    for option, value in _pairs(argv, read.problems):
        if option in _OF_THE_HOST or option in _FLAGS_OF_THE_HOST:
            continue
        reader = _READERS.get(option)
        if reader is None:
            read.note(f"the argument -{option} {value!r:.120} has no place in a guest's spec")
            continue
        with read.noting():
            reader(read, value)
    for value in read.devices:
        with read.noting():
            _read_device(read, value)
    if not read.has_nodefaults:
        read.note("without -nodefaults QEMU adds devices of its own: start it with -nodefaults")
    if read.serials != 1:
        read.note(f"it has {read.serials} -serial arguments, and a guest has exactly one")
    values = _values(read)
    try:
        spec = QemuSpec(**values)  # type: ignore[arg-type]  # each was made by a reader of its type
    except SpecInvalid as exc:
        read.problems += [f"its arguments make no spec: {problem}" for problem in exc.problems]
    if not read.problems:
        ours, theirs = _device_types(["", *device_arguments(spec)]), _device_types(argv)
        if ours != theirs:
            read.note(
                f"its -device arguments are {', '.join(theirs) or 'none'}; a destination would have them in the "
                f"order {', '.join(ours) or 'none'}, at other PCI addresses"
            )
    if read.problems:
        raise NotAdoptable(*_readable(read.problems))
    return spec


def _readable(problems: Sequence[str]) -> list[str]:
    """Give each sentence once, and no more and no longer than can be read; a command line may have any bytes."""
    shown = [
        "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in problem)
        for problem in dict.fromkeys(problem[:MAX_PROBLEM_CHARS] for problem in problems)
    ]
    more = len(shown) - MAX_PROBLEMS
    return [*shown[:MAX_PROBLEMS], f"and {more} more arguments like these"] if more > 0 else shown


def _device_types(argv: Sequence[str]) -> list[str]:
    """Give the types of all devices, in order."""
    return [value.partition(",")[0] for option, value in _pairs(argv, []) if option == "device"]


def _values(read: Read) -> dict[str, object]:
    """Give the fields of the spec; what is missing is noted and has a stand-in."""
    for key, option in (("guest_id", "-uuid"), ("name", "-name"), ("machine", "-machine"), ("cpu", "-cpu")):
        if key not in read.values:
            read.note(f"{option} is missing: a guest that moves needs it said")
    if not read.memories and not read.has_lost_memory:
        read.note(
            "its RAM is private to QEMU: start it with -object memory-backend-memfd,id=ram0,size=...,share=on and "
            "-machine ...,memory-backend=ram0"
        )
    memories = []
    for name, fields in read.memories.items():
        if name != read.main_memory and name not in read.nodes:
            read.note(f"the memory backend {name} is no RAM of the machine and of no NUMA node")
            continue
        with read.noting():
            memories.append(memory_of(read, name, fields, read.nodes.get(name, -1)))
    values = {"vcpus": 1, "accel": Accel.TCG, **_STAND_INS, **read.values}
    if memories:
        values["memories"] = tuple(sorted(memories, key=lambda memory: memory.node))
    return values | {"disks": tuple(read.disks), "networks": tuple(read.networks)}


def _read_name(read: Read, value: str) -> None:
    fields = fields_of(value, "guest")
    read.values["name"] = fields.pop("guest", "")
    nothing_left(read, "-name", fields, "name")


def _read_machine(read: Read, value: str) -> None:
    fields = fields_of(value, "type")
    read.values["machine"] = fields.pop("type", "")
    if "accel" in fields:
        _set_accel(read, fields.pop("accel"))
    read.main_memory = fields.pop("memory-backend", "")
    nothing_left(read, "-machine", fields, "machine")


def _read_accel(read: Read, value: str) -> None:
    fields = fields_of(value, "accel")
    _set_accel(read, fields.pop("accel", ""))
    nothing_left(read, "-accel", fields, "accel")


def _set_accel(read: Read, words: str) -> None:
    if words in tuple(Accel):
        read.values["accel"] = Accel(words)
    else:
        read.note(f"the accelerator {words!r:.40} is not one of {', '.join(Accel)}")


def _read_vcpus(read: Read, value: str) -> None:
    fields = fields_of(value, "cpus")
    words = fields.pop("cpus", "")
    if is_number(words):
        read.values["vcpus"] = int(words)
    else:
        read.note(f"-smp {value!r:.60} does not say how many")
    nothing_left(read, "-smp", fields, "smp")


def _read_size(read: Read, value: str) -> None:
    fields = fields_of(value, "size")
    bytes_of(fields.pop("size", ""), "-m")
    nothing_left(read, "-m", fields, "m")


def _read_object(read: Read, value: str) -> None:
    fields = fields_of(value, "qom-type")
    kind = fields.get("qom-type", "")
    if kind in ("memory-backend-memfd", "memory-backend-file"):
        read.memories[fields.pop("id", "")] = fields
    elif kind == "memory-backend-ram":
        read.has_lost_memory = True
        raise NotAdoptable(
            "memory-backend-ram cannot be mapped by an agent: use memory-backend-memfd with share=on"
        )
    elif kind != "rng-random":
        raise NotAdoptable(f"-object {kind:.60} has no place in a guest's spec")


def _read_numa(read: Read, value: str) -> None:
    fields = fields_of(value, "kind")
    kind, node, memory = fields.pop("kind", ""), fields.pop("nodeid", ""), fields.pop("memdev", "")
    if kind != "node" or not is_number(node) or not memory:
        read.nodes.setdefault(memory, -1)
        raise NotAdoptable(f"-numa {value!r:.80}: only node,nodeid=N,memdev=ID has a place in a guest's spec")
    nothing_left(read, "-numa", fields, "numa")
    read.nodes[memory] = int(node)


def _read_blockdev(read: Read, value: str) -> None:
    if value.lstrip().startswith("{"):
        # A number that is too long, or nested too deep, is no name either.
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(block := json.loads(value), dict):
                read.lost_drives.add(str(block.get("node-name")))
        raise NotAdoptable("-blockdev as JSON is not read: write it as driver=...,node-name=...")
    fields = fields_of(value, "driver")
    read.blocks[fields.get("node-name", "")] = fields


def _read_drive(read: Read, value: str) -> None:
    fields = fields_of(value, "file")
    read.lost_drives.add(fields.get("id", ""))
    if fields.get("if") == "pflash":
        raise NotAdoptable(f"-drive {value!r:.80} is firmware, which has no place in a guest's spec")
    raise NotAdoptable(f"-drive {value!r:.80}: use -blockdev and -device, which say what is what")


def _read_netdev(read: Read, value: str) -> None:
    fields = fields_of(value, "type")
    read.netdevs[fields.pop("id", "")] = fields


def _read_device(read: Read, value: str) -> None:
    fields = fields_of(value, "driver")
    driver = fields.pop("driver", "")
    fields.pop("id", None)
    match driver:
        case "virtio-blk-pci" | "scsi-hd":
            with read.noting():
                read.disks.append(disk_of(read, driver, fields))
        case "virtio-net-pci":
            with read.noting():
                read.networks.append(network_of(read, fields))
        case "virtio-scsi-pci":
            pass
        case "virtio-balloon-pci":
            read.values["has_balloon"] = True
            if fields.pop("free-page-reporting", "off") != "on":
                read.note("-device virtio-balloon-pci: without free-page-reporting=on it is another machine")
        case "virtio-rng-pci":
            read.values["has_rng"] = True
            fields.pop("rng", None)
        case "VGA":
            read.values["vga"] = Vga.STD
        case "virtio-vga":
            read.values["vga"] = Vga.VIRTIO
        case _:
            raise NotAdoptable(f"-device {driver:.60} has no place in a guest's spec")
    nothing_left(read, f"-device {driver}", fields, "device")


def _keep(key: str) -> Callable[[Read, str], None]:
    def read_it(read: Read, value: str) -> None:
        read.values[key] = value

    return read_it


def _keep_device(read: Read, value: str) -> None:
    read.devices.append(value)


def _read_serial(read: Read, value: str) -> None:
    read.serials += value != "none"


def _read_nodefaults(read: Read, value: str) -> None:
    read.has_nodefaults = True


def _read_kvm(read: Read, value: str) -> None:
    read.values["accel"] = Accel.KVM


def _read_display(read: Read, value: str) -> None:
    if value.partition(",")[0] not in ("none", "vnc", "egl-headless"):
        raise NotAdoptable(f"-display {value!r:.40} is a window: a guest that moves has none")


def _read_vga(read: Read, value: str) -> None:
    if value != "none":
        raise NotAdoptable(f"-vga {value!r:.40}: name the card by -device")


_READERS: Final[Mapping[str, Callable[[Read, str], None]]] = {
    "name": _read_name,
    "uuid": _keep("guest_id"),
    "machine": _read_machine,
    "M": _read_machine,
    "accel": _read_accel,
    "enable-kvm": _read_kvm,
    "cpu": _keep("cpu"),
    "smp": _read_vcpus,
    "m": _read_size,
    "object": _read_object,
    "numa": _read_numa,
    "nodefaults": _read_nodefaults,
    "display": _read_display,
    "vga": _read_vga,
    "serial": _read_serial,
    "kernel": _keep("kernel"),
    "initrd": _keep("initrd"),
    "append": _keep("append"),
    "blockdev": _read_blockdev,
    "drive": _read_drive,
    "netdev": _read_netdev,
    "device": _keep_device,
}
