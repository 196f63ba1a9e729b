"""RAM, disks and network cards of a command line, as the parts of a spec.

Law: pure. What has no place in a spec is a problem with a sentence of its own, and is never left out.
"""

from __future__ import annotations

import re

from agents.hypervisors.qemu import netdisks
from agents.hypervisors.qemu.arguments import Read, bytes_of, nothing_left
from agents.hypervisors.qemu.errors import NotAdoptable
from agents.hypervisors.qemu.spec import (
    Backend,
    Bus,
    Cache,
    DiskSpec,
    Format,
    MemorySpec,
    NetworkKind,
    NetworkSpec,
)

__all__ = ["disk_of", "memory_of", "network_of"]


def memory_of(read: Read, name: str, fields: dict[str, str], node: int) -> MemorySpec:
    """Give a backend of RAM. Raises NotAdoptable."""
    if fields.pop("share", "off") != "on":
        read.note(f"the memory backend {name} is not shared, so that no agent can map it: add share=on to it")
    kind, size_bytes = fields.pop("qom-type"), bytes_of(fields.pop("size", "0"), "-object")
    page_bytes = 0
    if kind == "memory-backend-memfd":
        backend = Backend.MEMFD
        if fields.pop("hugetlb", "off") == "on":
            page_bytes = bytes_of(fields.pop("hugetlbsize", "2M"), "-object")
    else:
        backend = Backend.FILE
        if re.search(r"huge", fields.pop("mem-path", "")):
            read.note(
                f"the memory backend {name} is a file of huge pages: use memory-backend-memfd,hugetlb=on"
            )
    nothing_left(read, f"-object {kind}", fields, "memory")
    return MemorySpec(name=name, size_bytes=size_bytes, backend=backend, page_bytes=page_bytes, node=node)


def disk_of(read: Read, driver: str, fields: dict[str, str]) -> DiskSpec:
    """Give the disk of a -device with these suboptions. Raises NotAdoptable."""
    node = fields.pop("drive", "")
    has_cache = fields.pop("write-cache", "on") == "on"
    if driver == "scsi-hd":
        fields.pop("bus", None)
    block = dict(read.blocks.get(node, {}))
    if not block:
        if node in read.lost_drives:
            raise NotAdoptable()
        raise NotAdoptable(f"-device {driver}: its drive {node!r:.40} is no -blockdev")
    kind, protocol = block.pop("driver", ""), block.pop("file.driver", "")
    is_remote = protocol in netdisks.PROTOCOLS
    if kind not in tuple(Format) or not (is_remote or protocol in ("file", "host_device")):
        raise NotAdoptable(
            f"-blockdev {node}: only raw and qcow2 in a file, a block device or a network disk "
            f"({', '.join(netdisks.PROTOCOLS)}) have a place in a guest's spec"
        )
    path = netdisks.take_url(protocol, block) if is_remote else block.pop("file.filename", "")
    if path is None:
        raise NotAdoptable(
            f"-blockdev {node}: what its {protocol} driver is told has no place in a guest's spec, where it is a URL "
            f"of letters, digits and ._:-/, of a server at an internet address (file.server.type=inet)"
        )
    is_direct = block.pop("cache.direct", "off") == "on"
    is_file_direct, is_flushed = (
        block.pop("file.cache.direct", "off") == "on",
        block.pop("cache.no-flush", "off") == "off",
    )
    if is_direct is not is_file_direct or not is_flushed:
        read.note(f"-blockdev {node}: its caching is none of {', '.join(Cache)}")
    elif not has_cache and not is_direct:
        read.note(f"-device {driver}: write-cache=off without cache.direct=on has no place in a guest's spec")
    cache = Cache.WRITEBACK if not is_direct else Cache.NONE if has_cache else Cache.DIRECTSYNC
    is_read_only = block.pop("read-only", "off") == "on"
    nothing_left(read, f"-blockdev {node}", block, "blockdev")
    bus = Bus.VIRTIO if driver == "virtio-blk-pci" else Bus.SCSI
    disk = DiskSpec(path=path, format=Format(kind), bus=bus, cache=cache, is_read_only=is_read_only)
    if disk.block_driver != protocol:
        raise NotAdoptable(
            f"-blockdev {node}: {path:.200} with file.driver={protocol} has no place in a guest's spec, where block "
            "devices are those below /dev"
        )
    return disk


def network_of(read: Read, fields: dict[str, str]) -> NetworkSpec:
    """Give the card of a -device with these suboptions. Raises NotAdoptable."""
    node, mac = fields.pop("netdev", ""), fields.pop("mac", "")
    backend = dict(read.netdevs.get(node, {}))
    kind = backend.pop("type", "")
    if backend.pop("vhost", "off") == "on" or kind.startswith("vhost"):
        read.note(
            f"-netdev {node}: vhost writes to the guest's RAM from outside of QEMU, and nothing here has proved that "
            "those writes are seen: use vhost=off"
        )
    if kind not in tuple(NetworkKind):
        if kind.startswith("vhost"):
            raise NotAdoptable()
        raise NotAdoptable(f"-netdev {kind!r:.40} has no place in a guest's spec")
    interface = backend.pop({"bridge": "br", "tap": "ifname"}.get(kind, ""), "")
    # Both are taken out, whichever is wrong.
    scripts = {backend.pop("script", ""), backend.pop("downscript", "no")} if kind == "tap" else {"no"}
    if scripts != {"no"}:
        read.note(f"-netdev tap {node}: scripts are not run by a destination: use script=no,downscript=no")
    backend.pop("helper", None)
    nothing_left(read, f"-netdev {node}", backend, "netdev")
    return NetworkSpec(kind=NetworkKind(kind), mac=mac, interface=interface)
