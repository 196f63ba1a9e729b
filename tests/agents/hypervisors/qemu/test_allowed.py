"""What a host's configuration and devices say against a guest: one provoked objection after another."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.spec import (
    Accel,
    Backend,
    Cache,
    DiskSpec,
    Format,
    MemorySpec,
    NetworkKind,
    NetworkSpec,
    QemuSpec,
)
from tests.agents.hypervisors.qemu.conftest import PLAIN
from tests.agents.storageproof.headers import header


class Place:
    """A host in a directory: everything that it would have in /sys, /srv and /boot."""

    def __init__(self, folder: Path) -> None:
        for name in (
            "shared",
            "boot",
            "net/br0/bridge",
            "net/tap0",
            "huge/hugepages-2048kB",
            "shm",
            "elsewhere",
        ):
            (folder / name).mkdir(parents=True)
        self.folder = folder
        self.huge(free=8, reserved=0)
        self.host = QemuHost(
            dir=folder / "q",
            binary=Path("/bin/sh"),
            shared_dirs=(folder / "shared",),
            kernel_dirs=(folder / "boot",),
            bridges=("br0", "br1", "tap0"),
            taps=("tap0",),
            memory_dir=folder / "shm",
            accels=(Accel.TCG,),
            sys_net=folder / "net",
            sys_huge=folder / "huge",
        )

    def huge(self, *, free: int, reserved: int) -> None:
        (self.folder / "huge/hugepages-2048kB/free_hugepages").write_text(f"{free}\n")
        (self.folder / "huge/hugepages-2048kB/resv_hugepages").write_text(f"{reserved}\n")

    def disk(self, name: str = "shared/a.raw", cache: Cache = Cache.NONE) -> DiskSpec:
        path = self.folder / name
        path.touch()
        return DiskSpec(path=str(path), format=Format.RAW, cache=cache)

    def says(self, spec: QemuSpec, **changes: object) -> list[tuple[str, str]]:
        host = replace(self.host, **changes)  # type: ignore[arg-type]
        return [(one.check, one.found) for one in host.objections(spec)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def card(kind: NetworkKind, interface: str) -> tuple[NetworkSpec, ...]:
    return (NetworkSpec(kind=kind, mac="52:54:00:00:00:01", interface=interface),)


def huge(pages: int) -> tuple[MemorySpec, ...]:
    return (MemorySpec(name="ram0", size_bytes=pages << 21, page_bytes=2 << 20),)


def test_a_good_guest_meets_no_objection(place: Place) -> None:
    (place.folder / "boot/vmlinuz").touch()
    spec = replace(
        PLAIN,
        memories=huge(8),
        disks=(place.disk(),),
        networks=card(NetworkKind.BRIDGE, "br0"),
        kernel=str(place.folder / "boot/vmlinuz"),
    )
    assert place.says(spec) == []


def test_each_objection_comes_alone_and_by_its_name(place: Place) -> None:
    link = place.folder / "shared/link.raw"
    link.symlink_to(place.folder / "elsewhere/secret")
    (place.folder / "elsewhere/secret").touch()
    gone = DiskSpec(path=str(place.folder / "shared/gone.raw"), format=Format.RAW)
    folder = DiskSpec(path=str(place.folder / "shared"), format=Format.RAW)
    thief = place.folder / "shared/thief.qcow2"
    thief.write_bytes(header(backing=b"/etc/passwd"))
    under = DiskSpec(path=str(thief), format=Format.QCOW2)
    no_device = DiskSpec(path="/dev/null", format=Format.RAW)
    remote = DiskSpec(path="nbd://store1:10809/guest-1", format=Format.RAW)
    cases: list[tuple[QemuSpec, dict[str, object], str, str]] = [
        # A guest's image names a file of this host: its QEMU would show it to the guest.
        (replace(PLAIN, disks=(under,)), {}, "disk-file", "/etc/passwd is in none of"),
        (replace(PLAIN, disks=(no_device,)), {"shared_devices": ("/dev/*",)}, "disk-file", "in none of"),
        (replace(PLAIN, disks=(remote,)), {}, "disk-file", "none of the network disks"),
        (
            replace(PLAIN, disks=(remote,)),
            {"network_disks": ("nbd://store1:1/guest-*",)},
            "disk-file",
            "none of the network disks",
        ),
        (PLAIN, {"accels": (Accel.KVM,)}, "accelerator", "not allowed"),
        (PLAIN, {"binary": place.folder / "none"}, "hypervisor-binary", "cannot be executed"),
        (replace(PLAIN, disks=(place.disk("elsewhere/a"),)), {}, "disk-file", "in none of the directories"),
        (replace(PLAIN, disks=(DiskSpec(path=str(link), format=Format.RAW),)), {}, "disk-file", "in none of"),
        (replace(PLAIN, disks=(gone,)), {}, "disk-file", "No such file"),
        (replace(PLAIN, disks=(folder,)), {}, "disk-file", "is no file"),
        (replace(PLAIN, kernel="/etc/passwd"), {}, "kernel-file", "in none of the directories"),
        (replace(PLAIN, networks=card(NetworkKind.BRIDGE, "virbr9")), {}, "network-backend", "not allowed"),
        (
            replace(PLAIN, networks=card(NetworkKind.BRIDGE, "br1")),
            {},
            "network-backend",
            "there is no bridge br1",
        ),
        (replace(PLAIN, networks=card(NetworkKind.BRIDGE, "tap0")), {}, "network-backend", "is no bridge"),
        (replace(PLAIN, networks=card(NetworkKind.TAP, "br0")), {}, "network-backend", "not allowed"),
        (replace(PLAIN, memories=huge(9)), {}, "hugepages", "9 huge pages of 2 MiB are needed, and 8"),
        (
            replace(PLAIN, memories=(replace(PLAIN.memories[0], backend=Backend.FILE),)),
            {"memory_dir": place.folder / "none"},
            "memory-dir",
            "cannot be written",
        ),
    ]
    for spec, changes, check, words in cases:
        said = place.says(spec, **changes)
        assert [name for name, _ in said] == [check], (words, said)
        assert words in said[0][1]


def test_reserved_huge_pages_are_not_free(place: Place) -> None:
    place.huge(free=8, reserved=3)
    assert place.says(replace(PLAIN, memories=huge(5))) == []
    assert [check for check, _ in place.says(replace(PLAIN, memories=huge(6)))] == ["hugepages"]


def test_all_objections_come_at_once(place: Place) -> None:
    spec = replace(
        PLAIN,
        disks=(place.disk("elsewhere/a"), place.disk("elsewhere/b")),
        networks=card(NetworkKind.TAP, "tap9"),
    )
    assert len(place.says(spec, accels=(Accel.KVM,))) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_disk_that_cannot_be_written_is_said(place: Place) -> None:
    disk = place.disk()
    Path(disk.path).chmod(0o400)
    assert place.says(replace(PLAIN, disks=(disk,)))[0][0] == "disk-file"
    assert place.says(replace(PLAIN, disks=(replace(disk, is_read_only=True),))) == []
