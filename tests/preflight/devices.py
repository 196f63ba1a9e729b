"""Devices that stay with their host, machines that another release does not make, and names that are taken."""

from __future__ import annotations

import pytest

from agents.api import CheckReport
from agents.hypervisors.qemu.qmp import Qmp
from agents.hypervisors.qemu.spec import MemorySpec, Vga
from tests.agents.host.qemu_by_hand import started_by_hand
from tests.agents.hypervisors.qemu.impostor import write_impostor
from tests.hugepages import huge_pages
from tests.needs import NotHere, need_file, need_program, need_root
from tests.preflight.cases import fits, problem, warned
from tests.preflight.stage import Build

QEMU_ON_BOTH = "\n"


async def started(build: Build, *more: str, machine: str = "pc-q35-7.2", ram: str = "64M") -> CheckReport:
    """What is said of a guest that a person started with more arguments than a description has a place for."""
    async with build(qemu=QEMU_ON_BOTH) as stage:
        with started_by_hand(stage.fleet) as guests:
            return await stage.check(await guests.start("host-a", *more, machine=machine, ram=ram))


async def towards(build: Build, **plan: object) -> CheckReport:
    """What is said of a guest whose destination has the QEMU of a plan."""
    binary = write_impostor(build.folder / "qemu", **plan)  # type: ignore[arg-type]
    async with build(qemu={"host-a": "\n", "host-b": f'binary = "{binary}"\n'}) as stage:
        return await stage.check(await stage.qemu(has_balloon=True, vga=Vga.STD))


@fits
async def a_guest_with_a_display_and_a_balloon(build: Build) -> CheckReport:
    async with build(qemu=QEMU_ON_BOTH) as stage:
        return await stage.check(await stage.qemu(has_balloon=True, has_rng=True, vga=Vga.STD))


@fits
async def a_guest_that_a_person_started(build: Build) -> CheckReport:
    card = "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01"
    return await started(build, "-device", card, "-netdev", "user,id=n")


@fits
async def a_destination_of_a_newer_release(build: Build) -> CheckReport:
    return await towards(build, version=(8, 2, 1))


@problem("guest-blocked")
async def arguments_that_no_description_has_a_place_for(build: Build) -> CheckReport:
    return await started(build, "-rtc", "base=localtime", "-smbios", "type=1,product=x", "-boot", "menu=on")


@problem("guest-blocked", "shared-memory")
async def memory_that_is_shared_with_other_guests(build: Build) -> CheckReport:
    backend = "memory-backend-memfd,id=sh,size=1M,share=on"
    return await started(build, "-object", backend, "-device", "ivshmem-plain,memdev=sh")


@problem("guest-blocked", "passthrough")
async def a_usb_stick_of_its_host(build: Build) -> CheckReport:
    return await started(
        build, "-device", "qemu-xhci", "-device", "usb-host,vendorid=0x1234,productid=0x5678"
    )


@problem("guest-blocked", "virtiofs")
async def a_directory_of_its_host_by_9p(build: Build) -> CheckReport:
    directory = f"local,id=fs0,path={build.folder},security_model=none"
    return await started(build, "-fsdev", directory, "-device", "virtio-9p-pci,fsdev=fs0,mount_tag=x")


@problem("guest-blocked", "virtiofs")
async def a_directory_of_its_host_by_virtiofs(build: Build) -> CheckReport:
    need_root()
    daemon = need_file("qemu-system-common of QEMU 7.2", "/usr/lib/qemu/virtiofsd")
    async with build(qemu=QEMU_ON_BOTH) as stage:
        with started_by_hand(stage.fleet) as guests:
            socket = build.folder / "fs.sock"
            argv = (daemon, f"--socket-path={socket}", "-o", f"source={stage.shared}", "-o", "sandbox=chroot")
            await guests.start_helper(*argv, socket=socket)
            chardev = ("-chardev", f"socket,id=fs,path={socket}")
            return await stage.check(
                await guests.start("host-a", *chardev, "-device", "vhost-user-fs-pci,chardev=fs,tag=x")
            )


@problem("guest-blocked", "tpm")
async def a_tpm(build: Build) -> CheckReport:
    need_program("swtpm")
    async with build(qemu=QEMU_ON_BOTH) as stage:
        with started_by_hand(stage.fleet) as guests:
            state, socket = build.folder / "tpm", build.folder / "tpm.sock"
            state.mkdir()
            ctrl = ("--ctrl", f"type=unixio,path={socket}")
            argv = ("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", *ctrl)
            await guests.start_helper(*argv, socket=socket)
            chip = ("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0")
            chardev = ("-chardev", f"socket,id=tpm,path={socket}")
            return await stage.check(await guests.start("host-a", *chardev, *chip))


@problem("guest-blocked", "persistent-memory")
async def persistent_memory(build: Build) -> CheckReport:
    backend = f"memory-backend-file,id=pm,size=16M,share=on,mem-path={build.folder / 'pmem'}"
    device = ("-object", backend, "-device", "virtio-pmem-pci,memdev=pm")
    return await started(build, *device, ram="64M,slots=2,maxmem=1G")


@problem("guest-blocked", "firmware")
async def uefi_variables_that_no_other_host_has(build: Build) -> CheckReport:
    flash = []
    for name in ("code", "vars"):
        file = build.folder / f"{name}.fd"
        file.write_bytes(bytes(256 << 10))
        flash += ["-blockdev", f"driver=raw,file.driver=file,node-name={name},file.filename={file}"]
    return await started(build, *flash, machine="pc-q35-7.2,pflash0=code,pflash1=vars")


@problem("guest-blocked")
async def a_device_that_was_plugged_in_later(build: Build) -> CheckReport:
    async with build(qemu=QEMU_ON_BOTH) as stage:
        with started_by_hand(stage.fleet) as guests:
            guest_id = await guests.start("host-a", machine="pc-i440fx-7.2")
            qmp = await Qmp.connect(guests.monitor("host-a"))
            await qmp.execute("device_add", {"driver": "virtio-balloon-pci", "id": "late0"})
            await qmp.aclose()
            return await stage.check(guest_id)


@problem("guest-blocked", "passthrough", "shared-memory", "virtiofs")
async def three_devices_of_three_kinds(build: Build) -> CheckReport:
    return await started(
        build,
        *("-object", "memory-backend-memfd,id=sh,size=1M,share=on", "-device", "ivshmem-plain,memdev=sh"),
        *("-device", "qemu-xhci", "-device", "usb-host,vendorid=0x1234,productid=0x5678"),
        *("-fsdev", f"local,id=fs0,path={build.folder},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=fs0,mount_tag=x"),
    )


@problem("hypervisor-version")
async def a_destination_of_an_older_release(build: Build) -> CheckReport:
    return await towards(build, version=(7, 1, 9))


@warned("hypervisor-version")
async def a_destination_that_is_far_ahead(build: Build) -> CheckReport:
    return await towards(build, version=(10, 1, 0))


@problem("machine")
async def a_machine_that_the_destination_does_not_know(build: Build) -> CheckReport:
    return await towards(build, version=(7, 2, 0), hidden=("pc-q35-7.2",))


@warned("machine")
async def a_machine_that_is_deprecated_there(build: Build) -> CheckReport:
    return await towards(build, version=(8, 2, 0), deprecated=("pc-q35-7.2",))


@problem("device-types")
async def two_devices_that_the_destination_does_not_have(build: Build) -> CheckReport:
    return await towards(build, version=(7, 2, 0), hidden=("VGA", "virtio-balloon-pci"))


@problem("firmware")
async def a_bios_of_another_size(build: Build) -> CheckReport:
    data_dir = build.folder / "firmware"
    data_dir.mkdir()
    (data_dir / "bios-256k.bin").write_bytes(bytes(128 << 10))
    return await towards(build, version=(7, 2, 0), data_dir=data_dir)


@problem("hugepages")
async def no_huge_pages_left(build: Build) -> CheckReport:
    need_root()
    memory = MemorySpec(name="ram0", size_bytes=64 << 20, page_bytes=2 << 20)
    # Both hosts are this machine: what the guest has is not free for the other.
    try:
        with huge_pages(40):
            async with build(qemu=QEMU_ON_BOTH) as stage:
                return await stage.check(await stage.qemu(memories=(memory,)))
    except pytest.skip.Exception as exc:
        raise NotHere(str(exc)) from exc


@problem("network-backend")
async def two_networks_that_are_not_allowed_there(build: Build) -> CheckReport:
    need_root()
    need_file("a kernel with TUN", "/dev/net/tun")
    cards = [
        word
        for number in (0, 1)
        for word in (
            *("-netdev", f"tap,id=n{number},ifname=vmf-matrix{number},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=n{number},mac=52:54:00:00:00:0{number}"),
        )
    ]
    return await started(build, *cards)


@warned("name")
async def another_guest_of_the_same_name_there(build: Build) -> CheckReport:
    async with build() as stage:
        await stage.embedded("host-b")
        return await stage.check(await stage.embedded())
