"""Firmware: what the guest's machine has loaded, against what the destination would load for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.facts import FileFacts
from migrate.preflight.evidence import Inspection
from migrate.preflight.report import Check, Finding

__all__ = ["FIRMWARE", "judge"]

FIRMWARE: Final = Check(
    check_id="firmware",
    asked="Does the destination load firmware of the same size, and is the guest's own firmware shared?",
    why="Firmware is a part of the guest's memory, which must have the same size at both ends; and what a guest has "
    "stored in its UEFI variables is lost where the file is another",
    remedy="Install the same firmware packages (SeaBIOS, iPXE, OVMF) on both hosts",
)


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge each image that the machine loads by itself, then the files of the guest's own."""
    guest, host = inspection.guest, inspection.host
    findings = [*_roms(inspection), *_own(inspection)]
    yield from findings
    if not findings:
        roms = guest.hardware.roms
        there = {rom.name: rom.sha256 for rom in host.hardware.roms}
        other = [rom.name for rom in roms if rom.sha256 and there.get(rom.name, rom.sha256) != rom.sha256]
        note = f"; {', '.join(other)} there is another version, which a reset loads" if other else ""
        yield FIRMWARE.ok(f"{len(roms)} images of firmware take the same memory on {host.name}{note}")


def _roms(inspection: Inspection) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    if guest.hardware.roms and not host.hardware.roms:
        yield FIRMWARE.unknown(f"{host.name} does not say what firmware its hypervisor loads")
        return
    there = {rom.name: rom for rom in host.hardware.roms}
    for rom in guest.hardware.roms:
        if rom.name not in there:
            yield FIRMWARE.refused(
                f"{guest.name} has loaded {rom.name}, which the hypervisor of {host.name} does not find"
            )
        elif there[rom.name].size_bytes != rom.size_bytes:
            yield FIRMWARE.refused(
                f"{rom.name} takes {rom.size_bytes >> 10} KiB of {guest.name}'s memory, and would take "
                f"{there[rom.name].size_bytes >> 10} KiB on {host.name}"
            )


def _own(inspection: Inspection) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    if guest.hardware.firmware is None:
        return
    there = {one.role: one for one in host.hardware.firmware.files} if host.hardware.firmware else {}
    for here in guest.hardware.firmware.files:
        what = f"the {here.role} of {guest.name}'s {guest.hardware.firmware.kind} firmware, {here.path},"
        found = there.get(here.role, FileFacts(role=here.role, path="", error="it did not answer for it"))
        if not here.is_shared:
            yield FIRMWARE.refused(
                f"{what} is on no shared storage of {inspection.source_host}",
                "Put it below one of [storage] shared_dirs, and start the guest from there",
            )
        elif here.error or found.error:
            where, error = (inspection.source_host, here.error) if here.error else (host.name, found.error)
            yield FIRMWARE.refused(f"{what} cannot be compared: {where}: {error:.200}")
        elif not found.is_shared or found.path != here.path:
            yield FIRMWARE.refused(f"{what} is on no shared storage of {host.name}")
        elif found.sha256 != here.sha256 or not here.sha256:
            yield FIRMWARE.refused(
                f"{what} is another file on {host.name}: {here.size_bytes} bytes of SHA-256 "
                f"{here.sha256[:16] or 'unknown'} here, {found.size_bytes} of {found.sha256[:16] or 'unknown'} there",
                "Mount the same storage at the same path on both hosts",
            )
