"""What stands against a QEMU guest that a person started, provoked for real: all of it in one report."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agents.api import Check, CheckReport
from agents.hypervisors.qemu.hardware import devices_of
from agents.hypervisors.qemu.netdisks import words_of
from agents.hypervisors.qemu.qmp import Qmp
from agents.storageproof.urls import as_file, parse
from migrate.facts import MAX_DEVICES
from migrate.preflight import AREAS, Finding, Severity
from tests.agents.diskservers import iscsi_lun
from tests.agents.host.fleet import report_of, running_fleet
from tests.agents.host.qemu_by_hand import ByHand, started_by_hand
from tests.agents.hypervisors.qemu.conftest import needs_qemu, needs_root_tool
from tests.agents.hypervisors.qemu.impostor import write_impostor
from tests.hugepages import huge_pages
from tests.needs import skipped_where_not_here

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt("module"),
    needs_qemu(),
]

VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")


@asynccontextmanager
async def by_hand(
    folder: Path, qemu: str | Mapping[str, str] = "\n", storage: str = ""
) -> AsyncIterator[ByHand]:
    async with running_fleet(folder, qemu=qemu, storage=storage) as fleet:
        with started_by_hand(fleet) as guests:
            yield guests


async def check(guests: ByHand, guest: str = "web1") -> list[Finding]:
    """All findings of a check from host-a to host-b: at least one for every check that there is."""
    report = await guests.fleet.ask("host-a", Check(guest=guest, to="host-b"))
    assert isinstance(report, CheckReport), report
    assert {one.check for one in report.findings} == {
        check.check_id for area in AREAS for check in area.CHECKS
    }
    return list(report.findings)


def of(findings: list[Finding], severity: Severity) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in findings:
        if one.severity is severity:
            found.setdefault(one.check, []).append(one.found)
    return found


def refused(findings: list[Finding]) -> dict[str, list[str]]:
    return of(findings, Severity.REFUSED)


async def test_a_guest_that_can_move_is_proved_to(folder: Path) -> None:
    async with by_hand(folder) as guests:
        await guests.start(
            "host-a",
            *("-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01", "-netdev", "user,id=n"),
            *("-device", "virtio-balloon-pci,free-page-reporting=on", "-device", "VGA"),
        )
        findings = await check(guests)
        assert not refused(findings), findings
        texts = {one.check: one.found for one in findings}
        assert "has all 4 types" in texts["device-types"]
        # Its BIOS, that of its display, and the network card's.
        assert texts["firmware"].startswith("3 images of firmware take the same memory")
        assert "7.2" in texts["hypervisor-version"]


async def test_every_reason_against_a_guest_is_in_one_report_and_in_the_refusal_of_a_move(
    folder: Path,
) -> None:
    async with by_hand(folder) as guests:
        guest_id = await guests.start(
            "host-a",
            *("-object", "memory-backend-memfd,id=sh,size=1M,share=on"),
            *("-device", "ivshmem-plain,memdev=sh,id=shm0", "-device", "qemu-xhci"),
            *("-device", "usb-host,vendorid=0x1234,productid=0x5678,id=stick"),
            *("-fsdev", f"local,id=fs0,path={folder},security_model=none"),
            *("-device", "virtio-9p-pci,fsdev=fs0,mount_tag=x,id=dir0"),
            *("-rtc", "base=localtime", "-smbios", "type=1,product=x"),
        )
        findings = await check(guests)
        found = refused(findings)
        assert set(found) == {"guest-blocked", "shared-memory", "passthrough", "virtiofs"}
        for words in (
            *("-device ivshmem-plain", "-device qemu-xhci", "-device usb-host", "-device virtio-9p-pci"),
            *("-fsdev", "-rtc", "-smbios", "memory backend sh", "'ivshmem'"),
        ):
            assert sum(words in one for one in found["guest-blocked"]) == 1, (words, found)
        assert "shm0" in found["shared-memory"][0]
        assert "stick" in found["passthrough"][0]
        assert "dir0" in found["virtiofs"][0]
        # What needs no description of the machine was judged, and what needs one is unknown.
        passed = of(findings, Severity.OK)
        for wanted in ("hypervisor-version", "machine", "cpu-model", "cpu-features", "memory", "firmware"):
            assert wanted in passed, wanted
        assert {"network-backend", "hugepages", "disk-file"} <= set(of(findings, Severity.UNKNOWN))
        report = report_of(
            await guests.fleet.follow("host-a", await guests.fleet.start(guest_id, "host-a", "host-b"))
        )
        for words in ("-rtc", "-smbios", "ivshmem-plain", "usb-host"):
            assert words in (report.error or "")


@needs_root_tool("swtpm")
async def test_a_tpm_is_refused_by_name(folder: Path) -> None:
    async with by_hand(folder) as guests:
        state, socket = folder / "tpm", folder / "tpm.sock"
        state.mkdir()
        await guests.start_helper(
            *(
                "swtpm",
                "socket",
                "--tpm2",
                "--tpmstate",
                f"dir={state}",
                "--ctrl",
                f"type=unixio,path={socket}",
            ),
            socket=socket,
        )
        await guests.start(
            "host-a",
            *("-chardev", f"socket,id=tpm,path={socket}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"),
            *("-device", "tpm-crb,tpmdev=tpm0,id=chip"),
        )
        found = refused(await check(guests))
        assert len(found["tpm"]) == 1
        assert "chip" in found["tpm"][0]
        assert "swtpm" in found["tpm"][0]
        assert any("-tpmdev" in one for one in found["guest-blocked"])


@pytest.mark.skipif(not VIRTIOFSD.exists(), reason="needs virtiofsd of QEMU 7.2 (Debian: qemu-system-common)")
async def test_virtiofs_is_refused_by_name(folder: Path) -> None:
    async with by_hand(folder) as guests:
        socket = folder / "fs.sock"
        await guests.start_helper(
            *(str(VIRTIOFSD), f"--socket-path={socket}", "-o", f"source={guests.fleet.shared}"),
            *("-o", "sandbox=chroot"),
            socket=socket,
        )
        await guests.start(
            "host-a",
            *("-chardev", f"socket,id=fs,path={socket}"),
            *("-device", "vhost-user-fs-pci,chardev=fs,tag=x,id=share0"),
        )
        found = refused(await check(guests))
        assert len(found["virtiofs"]) == 1
        assert "share0" in found["virtiofs"][0]
        assert "vhost-user" not in found


async def test_persistent_memory_is_refused_by_name(folder: Path) -> None:
    async with by_hand(folder) as guests:
        await guests.start(
            "host-a",
            *("-object", f"memory-backend-file,id=pm,size=16M,share=on,mem-path={folder / 'pmem'}"),
            *("-device", "virtio-pmem-pci,memdev=pm,id=pmem0"),
            ram="64M,slots=2,maxmem=1G",
        )
        found = refused(await check(guests))
        assert "pmem0" in found["persistent-memory"][0]


async def test_a_device_that_was_plugged_in_later_is_named(folder: Path) -> None:
    async with by_hand(folder) as guests:
        await guests.start("host-a", machine="pc-i440fx-7.2")
        assert not refused(await check(guests))
        qmp = await Qmp.connect(guests.monitor("host-a"))
        try:
            await qmp.execute("device_add", {"driver": "virtio-balloon-pci", "id": "late0"})
        finally:
            await qmp.aclose()
        found = refused(await check(guests))
        assert set(found) == {"guest-blocked"}
        (sentence,) = found["guest-blocked"]
        assert "1 virtio-balloon-pci more than it was started with (late0)" in sentence


async def test_a_destination_of_an_older_release_lacks_all_that_it_lacks(folder: Path) -> None:
    data_dir = folder / "firmware"
    data_dir.mkdir()
    (data_dir / "bios-256k.bin").write_bytes(bytes(128 << 10))
    binary = write_impostor(
        folder / "qemu",
        version=(6, 2, 0),
        hidden=("pc-q35-7.2", "virtio-balloon-pci", "VGA"),
        data_dir=data_dir,
    )
    async with by_hand(folder, qemu={"host-a": "\n", "host-b": f'binary = "{binary}"\n'}) as guests:
        await guests.start(
            "host-a",
            *("-device", "virtio-balloon-pci,free-page-reporting=on,id=balloon0", "-device", "VGA,id=video0"),
        )
        found = refused(await check(guests))
        assert set(found) == {"hypervisor-version", "machine", "device-types", "firmware"}
        assert "6.2.0" in found["hypervisor-version"][0]
        assert len(found["device-types"]) == 2
        assert any("bios-256k.bin takes 256 KiB" in one and "128 KiB" in one for one in found["firmware"])
        assert any("vgabios-stdvga.bin" in one and "does not find" in one for one in found["firmware"])


async def test_a_destination_far_ahead_is_a_warning(folder: Path) -> None:
    binary = write_impostor(folder / "qemu", version=(10, 1, 0))
    async with by_hand(folder, qemu={"host-a": "\n", "host-b": f'binary = "{binary}"\n'}) as guests:
        await guests.start("host-a")
        findings = await check(guests)
        assert not refused(findings)
        assert "hypervisor-version" in of(findings, Severity.WARNING)


async def test_a_deprecated_machine_and_a_name_that_is_taken_are_warnings(folder: Path) -> None:
    binary = write_impostor(folder / "qemu", version=(8, 2, 0), deprecated=("pc-q35-7.2",))
    async with by_hand(folder, qemu={"host-a": "\n", "host-b": f'binary = "{binary}"\n'}) as guests:
        guest_id = await guests.start("host-a")
        await guests.start("host-b")
        findings = await check(guests, guest_id)
        assert not refused(findings)
        assert {"machine", "name"} <= set(of(findings, Severity.WARNING))


async def test_uefi_is_compared_file_by_file(folder: Path) -> None:
    async with by_hand(folder) as guests:
        code, variables = guests.fleet.shared / "code.fd", folder / "vars.fd"
        for file in (code, variables):
            file.write_bytes(bytes(256 << 10))
        flash = "driver=raw,file.driver=file,node-name"
        await guests.start(
            "host-a",
            *("-blockdev", f"{flash}=code,read-only=on,file.filename={code}"),
            *("-blockdev", f"{flash}=vars,file.filename={variables}"),
            machine="pc-q35-7.2,pflash0=code,pflash1=vars",
        )
        found = refused(await check(guests))
        # The code is on shared storage and the variables are not.
        (sentence,) = found["firmware"]
        assert str(variables) in sentence
        assert "no shared storage" in sentence
        assert any("pflash0" in one for one in found["guest-blocked"])


async def test_a_lun_of_a_guest_that_no_spec_describes_is_looked_at(folder: Path) -> None:
    image = folder / "lun.raw"
    image.write_bytes(os.urandom(1 << 20))
    with skipped_where_not_here(), iscsi_lun(image) as url:
        place = parse(url)
        assert place is not None
        words = as_file(words_of(place))
        async with by_hand(folder, storage=f'network_disks = ["{url}"]') as guests:
            await guests.start(
                "host-a",
                *("-usb", "-blockdev", f"driver=raw,node-name=d,cache.direct=on,file.driver=iscsi,{words}"),
                *("-device", "virtio-blk-pci,drive=d"),
            )
            findings = await check(guests)
        assert "-usb" in refused(findings)["guest-blocked"][0]
        assert not refused(findings).keys() & {"storage", "disk-content", "disk-access", "disk-file"}
        assert any(url in one.found for one in findings if one.check == "storage")


async def test_missing_huge_pages_and_a_network_that_is_not_allowed_are_said_together(folder: Path) -> None:
    # Both agents have the same pages: those that the guest has are not free for the other.
    with huge_pages(40):
        async with by_hand(folder) as guests:
            await guests.start(
                "host-a",
                *("-netdev", "tap,id=n0,ifname=vmf-devices0,script=no,downscript=no"),
                *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01"),
                *("-netdev", "tap,id=n1,ifname=vmf-devices1,script=no,downscript=no"),
                *("-device", "virtio-net-pci,netdev=n1,mac=52:54:00:00:00:02"),
                memory="memory-backend-memfd,id=ram0,size=64M,share=on,hugetlb=on,hugetlbsize=2M,prealloc=on",
            )
            found = refused(await check(guests))
            assert set(found) == {"hugepages", "network-backend"}
            assert len(found["network-backend"]) == 2
            assert "32 huge pages of 2 MiB are needed, and 8 are free" in found["hugepages"][0]


async def test_devices_are_counted_to_their_limit(folder: Path) -> None:
    async with by_hand(folder) as guests:
        await guests.start(
            "host-a",
            *("-device", "virtio-scsi-pci,id=scsi0"),
            *(
                word
                for number in range(MAX_DEVICES + 1)
                for word in ("-device", f"scsi-cd,bus=scsi0.0,lun={number % 250},scsi-id={number // 250}")
            ),
        )
        qmp = await Qmp.connect(guests.monitor("host-a"))
        try:
            devices, more = await devices_of(qmp)
        finally:
            await qmp.aclose()
        assert (len(devices), more) == (MAX_DEVICES, 3)
        found = refused(await check(guests))
        assert found["device-types"] == ["web1 has 3 devices more than can be judged"]
