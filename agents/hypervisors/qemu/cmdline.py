"""A spec as QEMU's arguments. The inverse is `adopt`.

Law: pure, and the only place that writes arguments of QEMU: nothing that came over the wire becomes one by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agents.hypervisors.qemu.netdisks import words_of
from agents.hypervisors.qemu.spec import Backend, Bus, Cache, DiskSpec, MemorySpec, NetworkKind, QemuSpec, Vga
from agents.storageproof.urls import as_file, parse

__all__ = ["HostPaths", "argv_of", "device_arguments"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPaths:
    """What this host adds to a machine: its binary, its sockets, its files."""

    binary: Path
    qmp: Path
    monitor: Path
    console: Path
    console_log: Path
    pid: Path
    memory_dir: Path = Path("/dev/shm")


def argv_of(spec: QemuSpec, host: HostPaths, *, is_incoming: bool) -> list[str]:
    """Give the arguments of one machine; with `is_incoming`, of an empty one that waits for its state."""
    argv = [str(host.binary), "-name", f"guest={spec.name}", "-uuid", spec.guest_id]
    # Its RAM stays out of its core: what a guest knows is nobody's to read in a crash report.
    machine = f"{spec.machine},accel={spec.accel},dump-guest-core=off"
    if spec.memories[0].node == -1:
        machine += f",memory-backend={spec.memories[0].name}"
    argv += ["-machine", machine, "-cpu", spec.cpu, "-smp", str(spec.vcpus), "-m", f"{spec.ram_bytes >> 20}M"]
    for memory in spec.memories:
        argv += ["-object", _memory_object(memory, host)]
        if memory.node >= 0:
            argv += ["-numa", f"node,nodeid={memory.node},memdev={memory.name}"]
    argv += ["-no-user-config", "-nodefaults", "-display", "none"]
    for name, path in (("qmp", host.qmp), ("monitor", host.monitor)):
        argv += ["-chardev", f"socket,id={name},path={path},server=on,wait=off"]
        argv += ["-mon", f"chardev={name},mode=control"]
    log = f"logfile={host.console_log},logappend=on"
    argv += ["-chardev", f"socket,id=console,path={host.console},server=on,wait=off,{log}"]
    argv += ["-serial", "chardev:console"]
    for option, value in (("-kernel", spec.kernel), ("-initrd", spec.initrd), ("-append", spec.append)):
        if value:
            argv += [option, value]
    argv += device_arguments(spec)
    argv += ["-daemonize", "-pidfile", str(host.pid)]
    if is_incoming:
        argv += ["-S", "-incoming", "defer"]
    return argv


def _memory_object(memory: MemorySpec, host: HostPaths) -> str:
    size = f"id={memory.name},size={memory.size_bytes},share=on"
    if memory.backend is Backend.MEMFD:
        huge = f",hugetlb=on,hugetlbsize={memory.page_bytes}" if memory.page_bytes else ""
        return f"memory-backend-memfd,{size}{huge}"
    return f"memory-backend-file,{size},mem-path={host.memory_dir}"


def device_arguments(spec: QemuSpec) -> Iterator[str]:
    """Give the arguments of disks, networks and the rest, in the order that gives each its PCI slot."""
    if any(disk.bus is Bus.SCSI for disk in spec.disks):
        yield from ("-device", "virtio-scsi-pci,id=scsi0")
    for number, disk in enumerate(spec.disks):
        is_direct = disk.cache is not Cache.WRITEBACK
        cache = f"cache.direct={_on(is_direct)},cache.no-flush=off"
        yield "-blockdev"
        yield (
            f"driver={disk.format},node-name=disk{number},read-only={_on(disk.is_read_only)},{cache},"
            f"file.driver={disk.block_driver},file.cache.direct={_on(is_direct)},{_place(disk)}"
        )
        device = "virtio-blk-pci" if disk.bus is Bus.VIRTIO else "scsi-hd"
        bus = "" if disk.bus is Bus.VIRTIO else ",bus=scsi0.0"
        through = _on(disk.cache is not Cache.DIRECTSYNC)
        yield from (
            "-device",
            f"{device},drive=disk{number},id=device-disk{number},write-cache={through}{bus}",
        )
    for number, network in enumerate(spec.networks):
        backend = {
            NetworkKind.USER: "user",
            NetworkKind.BRIDGE: f"bridge,br={network.interface}",
            NetworkKind.TAP: f"tap,ifname={network.interface},script=no,downscript=no,vhost=off",
        }[network.kind]
        yield from ("-netdev", f"{backend},id=net{number}")
        yield from ("-device", f"virtio-net-pci,netdev=net{number},id=device-net{number},mac={network.mac}")
    if spec.has_balloon:
        yield from ("-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on")
    if spec.has_rng:
        yield from (
            "-object",
            "rng-random,id=rng0,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,rng=rng0",
        )
    if spec.vga is not Vga.NONE:
        yield from ("-device", {Vga.STD: "VGA", Vga.VIRTIO: "virtio-vga"}[spec.vga] + ",id=video0")


def _place(disk: DiskSpec) -> str:
    url = parse(disk.path)
    if url is None:
        return f"file.filename={disk.path}"
    return as_file(words_of(url))


def _on(truth: bool) -> str:
    return "on" if truth else "off"
