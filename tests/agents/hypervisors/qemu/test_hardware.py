"""Kinds of devices, what they hold, what was plugged in later, and firmware: words of QEMU's as facts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.hypervisors.hostmemory import memory_nodes
from agents.hypervisors.qemu.cmdline import device_arguments
from agents.hypervisors.qemu.hardware import devices_of, kind_of, memory_nodes_of, passed_through, unplanned
from agents.hypervisors.qemu.observe import cpu_argument, observed_disks, observed_ram, own_firmware
from agents.hypervisors.qemu.qmp import Json, Qmp
from agents.hypervisors.qemu.romfiles import (
    MAX_FILES,
    MAX_FIRMWARE_BYTES,
    MAX_ROMS,
    RomShelf,
    loaded_images,
    memory_bytes,
)
from migrate.facts import DeviceFacts, DeviceKind, DiskKind, FileFacts, GuestFacts, GuestHardware
from tests.agents.hypervisors.qemu.conftest import PLAIN, RICH
from tests.migrate.world import FACTS
from transport.schema import Schema

SCHEMA: Final = Schema(GuestHardware, GuestFacts)

# What QEMU 7.2 prints, shortened.
RAMBLOCK = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
   0000:00:02.0/vga.vram    4 KiB  0x00000000041c0000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x0000000005200000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000004100000 0x0000000000040000 0x0000000000040000
0000:00:01.0/virtio-net-pci.rom    4 KiB  0x0000000004180000 0x0000000000040000 0x0000000000040000
/rom@genroms/linuxboot_dma.bin    4 KiB  0x0000000004180000 0x0000000000001000 0x0000000000001000
    0000:00:02.0/vga.rom    4 KiB  0x00000000051c0000 0x0000000000010000 0x0000000000010000
"""


@pytest.mark.parametrize(
    ("device_type", "kind"),
    [
        ("virtio-blk-pci", "emulated"),
        ("e1000", "emulated"),
        ("virtio-balloon-pci", "emulated"),
        ("vfio-pci", "passthrough"),
        ("vfio-pci-nohotplug", "passthrough"),
        ("usb-host", "passthrough"),
        ("usb-tablet", "emulated"),
        ("scsi-generic", "passthrough"),
        ("scsi-block", "passthrough"),
        ("scsi-hd", "emulated"),
        ("tpm-tis", "tpm"),
        ("tpm-crb", "tpm"),
        ("vhost-user-fs-pci", "virtiofs"),
        ("virtio-9p-pci", "virtiofs"),
        ("vhost-user-blk-pci", "vhost-user"),
        ("vhost-vsock-pci", "vhost"),
        ("vhost-scsi-pci", "vhost"),
        ("vhost-vdpa-device-pci", "vhost"),
        ("ivshmem-plain", "shared-memory"),
        ("ivshmem-doorbell", "shared-memory"),
        ("nvdimm", "persistent-memory"),
        ("virtio-pmem-pci", "persistent-memory"),
    ],
)
def test_a_type_tells_what_ties_the_device(device_type: str, kind: str) -> None:
    assert kind_of(device_type) == kind


def test_a_vfio_device_is_named_for_what_it_is(tmp_path: Path) -> None:
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    (tmp_path / "bus/mdev/devices" / uuid).mkdir(parents=True)
    (tmp_path / "bus/pci/devices/0000:01:10.0/physfn").mkdir(parents=True)
    for host, sysfs, words in (
        ("0000:01:00.0", "", "PCI device 0000:01:00.0"),
        ("0000:01:10.0", "", "SR-IOV virtual function 0000:01:10.0"),
        ("", f"/sys/bus/mdev/devices/{uuid}", f"mediated device {uuid}"),
        ("", "/sys/bus/pci/devices/0000:01:10.0", "SR-IOV virtual function 0000:01:10.0"),
        ("", "", ""),
        ("../../etc", "", ""),
        ("", "/sys/\x1b[0m", ""),
        ("x" * 65, "", ""),
    ):
        assert passed_through(host, sysfs, tmp_path) == words


def planned() -> list[DeviceFacts]:
    words = list(device_arguments(RICH))
    types = [
        value.partition(",")[0]
        for option, value in zip(words[::2], words[1::2], strict=True)
        if option == "-device"
    ]
    return [DeviceFacts(name=f"d{n}", type=one, kind="emulated") for n, one in enumerate(types)]


def test_devices_as_they_were_started_are_no_news() -> None:
    assert list(unplanned(RICH, planned())) == []
    assert list(unplanned(PLAIN, [])) == []


def test_what_was_plugged_in_or_out_is_said_each() -> None:
    devices = [one for one in planned() if one.type != "VGA"]
    devices.append(DeviceFacts(name="late0", type="virtio-net-pci", kind="emulated"))
    plugged_in, plugged_out = unplanned(RICH, devices)
    assert plugged_in.startswith("1 virtio-net-pci more")
    assert "late0" in plugged_in
    assert plugged_out.startswith("1 VGA less")


def test_what_is_no_device_of_qemus_is_not_counted() -> None:
    node = DeviceFacts(name="disk d", type="", kind=DeviceKind.PASSTHROUGH.value)
    assert list(unplanned(RICH, [*planned(), node])) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-cpu", "Nehalem"], "Nehalem"),
        (["-cpu", "Nehalem", "-cpu", "EPYC,-avx2"], "EPYC,-avx2"),
        (["-cpu", "host,migratable=off"], ""),
        (["-cpu"], ""),
        ([], ""),
    ],
)
def test_the_last_cpu_argument_counts_if_it_is_a_model_with_features(argv: list[str], words: str) -> None:
    assert cpu_argument(["qemu", *argv]) == words


@pytest.mark.parametrize(
    ("words", "nodes"),
    [("0\n", (0,)), ("0-2,5\n", (0, 1, 2, 5)), ("", ()), ("x-y,3", (3,)), ("0-99999999", ())],
)
def test_nodes_of_this_host_are_read_as_the_kernel_writes_them(
    tmp_path: Path, words: str, nodes: tuple[int, ...]
) -> None:
    (tmp_path / "has_memory").write_text(words)
    assert memory_nodes(tmp_path / "has_memory") == nodes
    assert memory_nodes(tmp_path / "none") == ()


_WORDS = st.text(max_size=8) | st.sampled_from(
    ["child<vfio-pci>", "child<tpm-crb>", "nvme", "bind", "/a", "\ud800"]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "name",
                    "type",
                    "drv",
                    "node-name",
                    "policy",
                    "host-nodes",
                    "inserted",
                    "image",
                    "filename",
                    "qdev",
                ]
            )
            | st.sampled_from(["base-memory", "removable", "options", "qemu", "major"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


class Liar:
    """A QEMU that answers anything."""

    def __init__(self, answers: list[Json]) -> None:
        self._answers = answers

    async def execute(self, command: str, arguments: object = None) -> Json:
        return self._answers.pop() if self._answers else None


@given(st.lists(_JSON, max_size=10))
def test_whatever_a_qemu_answers_its_facts_can_be_sent(answers: list[Json]) -> None:
    async def look() -> None:
        qmp = cast(Qmp, Liar(list(answers)))
        devices, more = await devices_of(qmp)
        nodes = await memory_nodes_of(qmp)
        SCHEMA.encode(GuestHardware(devices=devices, more_devices=more, memory_nodes=nodes))
        again = cast(Qmp, Liar(list(answers)))
        await own_firmware(again)
        disks, blocks = await observed_disks(again), await observed_ram(again)
        SCHEMA.encode(replace(FACTS, disks=disks, blocks=blocks))

    anyio.run(look)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("is_removable", "name", "kind"),
    [
        (False, "/srv/a.raw", DiskKind.FILE),
        (False, "nbd://store1:10809/a", DiskKind.NETWORK),
        (True, "/srv/install.iso", DiskKind.CDROM),
        (True, "https://store1/install.iso", DiskKind.NETWORK),
        (True, None, DiskKind.EMPTY),
    ],
)
async def test_a_drive_is_what_is_in_it(is_removable: bool, name: str | None, kind: DiskKind) -> None:
    inserted: dict[str, Json] = {"image": {"filename": name}, "ro": is_removable, "drv": "raw"}
    block: dict[str, Json] = {"qdev": "d", "removable": is_removable}
    if name is not None:
        block["inserted"] = inserted
    (disk,) = await observed_disks(cast(Qmp, Liar([[block]])))
    assert (disk.kind, disk.path) == (kind, name.replace("store1/", "store1:443/") if name else "")


# ---------------------------------------------------------------------- firmware


def test_images_are_found_among_the_blocks_of_ram() -> None:
    assert loaded_images(RAMBLOCK, "bios-256k.bin") == {
        "bios-256k.bin": 256 << 10,
        "efi-virtio.rom": 256 << 10,
        "linuxboot_dma.bin": 4096,
        "vgabios-stdvga.bin": 64 << 10,
    }
    # A BIOS that was named by its path is the guest's own.
    assert "bios" not in str(loaded_images(RAMBLOCK, "/srv/bios.bin")).replace("vgabios", "")


def test_images_are_as_many_as_a_machine_has_and_not_more() -> None:
    line = "/rom@genroms/r{}    4 KiB  0x0 0x1000 0x1000\n"
    assert len(loaded_images("".join(line.format(n) for n in range(MAX_ROMS + 1)), "")) == MAX_ROMS


@given(st.text(), st.text())
def test_whatever_is_printed_images_have_names_of_files(printed: str, firmware: str) -> None:
    assert all("/" not in name for name in loaded_images(printed, firmware))


@pytest.mark.parametrize(
    ("name", "file_bytes", "in_memory"),
    [
        ("bios-256k.bin", 262144, 262144),
        ("efi-virtio.rom", 249344, 262144),
        ("efi-virtio.rom", 262144, 262144),
        ("efi-virtio.rom", 262145, 524288),
        ("vgabios-stdvga.bin", 39936, 65536),
        ("linuxboot_dma.bin", 1536, 4096),
        ("efi-virtio.rom", 0, 0),
    ],
)
def test_an_image_takes_more_memory_than_its_file_has(name: str, file_bytes: int, in_memory: int) -> None:
    assert memory_bytes(name, file_bytes) == in_memory


def shelf(folder: Path) -> RomShelf:
    """A binary that looks in one directory."""
    for name in ("roms", "shared", "secret"):
        (folder / name).mkdir()
    binary = folder / "qemu"
    binary.write_text(f"#!/bin/sh\necho '{folder / 'missing'}'\necho '{folder / 'roms'}'\n")
    binary.chmod(0o755)
    return RomShelf(binary, (folder / "shared",))


@pytest.mark.anyio
async def test_only_what_lies_in_qemus_own_directories_is_found(tmp_path: Path) -> None:
    roms = shelf(tmp_path)
    (tmp_path / "roms/bios-256k.bin").write_bytes(bytes(8192))
    (tmp_path / "secret/key").write_bytes(b"key")
    (found,) = await roms.find(["bios-256k.bin", "../secret/key", str(tmp_path / "secret/key"), "none", ""])
    assert (found.name, found.size_bytes) == ("bios-256k.bin", 8192)
    # It is read again when it changes.
    (tmp_path / "roms/bios-256k.bin").write_bytes(bytes(4096) + b"x")
    (changed,) = await roms.find(["bios-256k.bin"])
    assert changed.sha256 != found.sha256
    assert len(await roms.find(f"r{n}" for n in range(10_000))) == 0


@pytest.mark.anyio
async def test_a_binary_that_says_nothing_has_no_images(tmp_path: Path) -> None:
    assert await RomShelf(tmp_path / "none").find(["bios-256k.bin"]) == ()


@pytest.mark.anyio
async def test_files_of_firmware_are_read_on_shared_storage_alone(tmp_path: Path) -> None:
    roms = shelf(tmp_path)
    code, secret = tmp_path / "shared/code.fd", tmp_path / "secret/key"
    code.write_bytes(b"code")
    secret.write_bytes(b"key")
    (tmp_path / "shared/link").symlink_to(secret)
    os.mkfifo(tmp_path / "shared/fifo")
    with (tmp_path / "shared/large").open("wb") as large:
        large.truncate(MAX_FIRMWARE_BYTES + 1)

    async def look(path: str | Path) -> FileFacts:
        firmware = await roms.own("uefi", [("code", str(path))])
        return firmware.files[0]

    found = await look(code)
    assert (found.is_shared, found.size_bytes, found.error) == (True, 4, "")
    assert found.sha256
    for path in (secret, tmp_path / "shared/link", tmp_path / "shared/../secret/key", "relative", ""):
        denied = await look(path)
        assert (denied.is_shared, denied.sha256) == (False, ""), path
    for path in (
        tmp_path / "shared/none",
        tmp_path / "shared/fifo",
        tmp_path / "shared/large",
        tmp_path / "shared",
    ):
        failed = await look(path)
        assert failed.error, path
        assert failed.sha256 == ""
    assert (await look("/a\0b")).error
    many = await roms.own("uefi", [("code", str(code))] * (MAX_FILES + 1))
    assert len(many.files) == MAX_FILES
