from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.hypervisors.qemu.errors import SpecInvalid
from agents.hypervisors.qemu.spec import (
    MAX_SPEC_BYTES,
    Accel,
    Backend,
    Bus,
    Cache,
    DiskSpec,
    Format,
    MemorySpec,
    NetworkKind,
    NetworkSpec,
    QemuSpec,
    Vga,
)
from tests.agents.hypervisors.qemu.conftest import GUEST_ID, PLAIN, RICH

VECTORS = Path(__file__).parents[3] / "vectors"
_MEMORY = MemorySpec(name="ram0", size_bytes=1 << 30)
_DISK = DiskSpec(path="/srv/a.raw", format=Format.RAW)
_CARD = NetworkSpec(kind=NetworkKind.USER, mac="52:54:00:00:00:01")


@pytest.mark.parametrize("spec", [PLAIN, RICH])
def test_a_spec_comes_back_as_it_was(spec: QemuSpec) -> None:
    assert QemuSpec.from_bytes(spec.to_bytes()) == spec


def test_the_wire_form_is_the_one_of_the_first_release() -> None:
    assert QemuSpec.from_bytes((VECTORS / "qemu_spec_v1.bin").read_bytes()) == RICH


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"guest_id": "3F0F4C6E-8F0B-4F57-9D0D-5A3C7C1B2A10"}, "id"),
        ({"guest_id": "00000000-0000-0000-0000-000000000000"}, "id"),
        ({"guest_id": "../../etc"}, "id"),
        ({"name": ""}, "name"),
        ({"name": "a,b"}, "name"),
        ({"machine": "q35"}, "machine"),
        ({"machine": "pc-q35-7.2,kernel=/etc/shadow"}, "machine"),
        ({"cpu": "host,migratable=off"}, "cpu"),
        ({"cpu": "max -S"}, "cpu"),
        ({"vcpus": 0}, "vcpus"),
        ({"memories": ()}, "memory"),
        ({"memories": (replace(_MEMORY, size_bytes=4097),)}, "memory.size"),
        ({"memories": (replace(_MEMORY, page_bytes=4096),)}, "memory.page_size"),
        ({"memories": (replace(_MEMORY, name="a,share=off"),)}, "memory.name"),
        ({"memories": (_MEMORY, replace(_MEMORY, name="ram1"))}, "memory.node"),
        ({"memories": (replace(_MEMORY, node=1),)}, "memory.node"),
        ({"memories": (replace(_MEMORY, node=0), replace(_MEMORY, node=1))}, "memory"),
        ({"memories": (replace(_MEMORY, backend=Backend.FILE, page_bytes=2 << 20),)}, "memory.backend"),
        ({"disks": (replace(_DISK, path="disk.raw"),)}, "disks.path"),
        ({"disks": (replace(_DISK, path="/srv/a,read-only=off"),)}, "disks.path"),
        ({"disks": (replace(_DISK, path="/srv/../etc/shadow"),)}, "disks.path"),
        ({"disks": (_DISK, _DISK)}, "disks.path"),
        ({"disks": (replace(_DISK, path="nbd://store1/no-port"),)}, "disks.path"),
        ({"disks": (replace(_DISK, path="nbd://store1:1/a,read-only=off"),)}, "disks.path"),
        ({"disks": (replace(_DISK, path="ssh://store1:22/a"),)}, "disks.path"),
        ({"disks": (replace(_DISK, path="https://store1:443/a.iso"),)}, "disks.path"),
        ({"networks": (replace(_CARD, mac="53:54:00:00:00:01"),)}, "networks.mac"),
        ({"networks": (_CARD, _CARD)}, "networks.mac"),
        ({"networks": (replace(_CARD, interface="eth0"),)}, "networks"),
        ({"networks": (replace(_CARD, kind=NetworkKind.TAP, interface="tap0,vhost=on"),)}, "networks.tap"),
        ({"initrd": "/boot/initrd"}, "kernel"),
        ({"kernel": "vmlinuz"}, "kernel"),
        ({"kernel": "/boot/k", "append": "a\nb"}, "append"),
    ],
)
def test_each_mistake_is_named_by_its_key(change: dict[str, object], key: str) -> None:
    with pytest.raises(SpecInvalid) as refused:
        replace(PLAIN, **change)  # type: ignore[arg-type]
    assert {problem.split(":")[0] for problem in refused.value.problems} == {key}


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(SpecInvalid) as refused:
        replace(PLAIN, name="", vcpus=0, machine="none")
    assert len(refused.value.problems) == 3


@given(st.binary(max_size=300))
def test_garbage_raises_only_its_own_error(wire: bytes) -> None:
    with pytest.raises(SpecInvalid):
        QemuSpec.from_bytes(wire)


@given(st.data())
def test_a_damaged_spec_is_refused_or_another_good_one(data: st.DataObject) -> None:
    wire = bytearray(RICH.to_bytes())
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= data.draw(st.integers(1, 255))
    try:
        spec = QemuSpec.from_bytes(bytes(wire))
    except SpecInvalid:
        return
    assert QemuSpec.from_bytes(spec.to_bytes()) == spec


def test_a_spec_that_is_too_long_is_not_parsed() -> None:
    with pytest.raises(SpecInvalid, match="the most"):
        QemuSpec.from_bytes(bytes(MAX_SPEC_BYTES + 1))


def test_a_person_writes_it_as_toml(tmp_path: Path) -> None:
    path = tmp_path / "web1.toml"
    path.write_text(f"""
kind = "qemu"
id = "{GUEST_ID}"
machine = "pc-q35-7.2"
accel = "tcg"
cpu = "Nehalem"
vcpus = 2
memory = "1GiB"
kernel = "boot/vmlinuz"
append = "quiet"
vga = "std"
balloon = true
rng = true
[[disks]]
path = "/srv/web1.qcow2"
format = "qcow2"
[[disks]]
path = "data.raw"
format = "raw"
bus = "scsi"
cache = "directsync"
read_only = true
[[networks]]
bridge = "br0"
mac = "52:54:00:12:34:56"
[[networks]]
user = true
mac = "52:54:00:12:34:57"
""")
    assert QemuSpec.from_toml(path) == QemuSpec(
        guest_id=GUEST_ID,
        name="web1",
        machine="pc-q35-7.2",
        accel=Accel.TCG,
        cpu="Nehalem",
        vcpus=2,
        memories=(MemorySpec(name="ram0", size_bytes=1 << 30),),
        kernel=str(tmp_path / "boot/vmlinuz"),
        append="quiet",
        vga=Vga.STD,
        has_balloon=True,
        has_rng=True,
        disks=(
            DiskSpec(path="/srv/web1.qcow2", format=Format.QCOW2),
            DiskSpec(
                path=str(tmp_path / "data.raw"),
                format=Format.RAW,
                bus=Bus.SCSI,
                cache=Cache.DIRECTSYNC,
                is_read_only=True,
            ),
        ),
        networks=(
            NetworkSpec(kind=NetworkKind.BRIDGE, mac="52:54:00:12:34:56", interface="br0"),
            NetworkSpec(kind=NetworkKind.USER, mac="52:54:00:12:34:57"),
        ),
    )


def test_numa_nodes_are_tables_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "numa.toml"
    path.write_text("""
machine = "pc-q35-7.2"
cpu = "Nehalem"
[[memory]]
size = "1GiB"
node = 0
[[memory]]
size = "2GiB"
node = 1
page_size = "2MiB"
""")
    memories = QemuSpec.from_toml(path).memories
    assert memories == (
        MemorySpec(name="ram0", size_bytes=1 << 30, node=0),
        MemorySpec(name="ram1", size_bytes=2 << 30, node=1, page_bytes=2 << 20),
    )


def test_every_mistake_of_a_file_is_told_by_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("""
machin = "pc-q35-7.2"
cpu = 3
memory = "lots"
[[disks]]
path = "a.raw"
format = "vmdk"
[[networks]]
mac = "52:54:00:12:34:56"
""")
    with pytest.raises(SpecInvalid) as refused:
        QemuSpec.from_toml(path)
    keys = {problem.split(":")[0] for problem in refused.value.problems}
    assert keys == {"machin", "machine", "cpu", "memory", "disks[0].format", "networks[0].bridge"}


def test_a_file_that_is_no_toml_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("= 1")
    with pytest.raises(SpecInvalid, match="not TOML"):
        QemuSpec.from_toml(tmp_path / "bad.toml")
    with pytest.raises(SpecInvalid, match="cannot be read"):
        QemuSpec.from_toml(tmp_path / "none.toml")
