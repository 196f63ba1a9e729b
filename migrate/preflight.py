"""The preflight: every reason why a move would not do, found before the first page and once more at the end.

Law: pure. All checks run, always; each finding says what was asked, what was found and what to do. A check
that could not be made is a refusal here: what was not proved is not believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from migrate.facts import GuestFacts, HostFacts, Objection

__all__ = ["RECORDS", "Finding", "Inspection", "PreflightReport", "Probe", "Reading", "Severity", "examine"]

# What the destination needs beside the guest's RAM: the hypervisor's own process, page tables, buffers.
OVERHEAD_BYTES: Final = 64 << 20
# The "disk" of a probe that was put where the ownership records are, when that is beside no disk.
RECORDS: Final = "ownership records"
# Of a list in a sentence: enough to choose from, short enough to be read.
MAX_NAMED: Final = 8


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A file with a fresh nonce that the source has put beside a disk. `path` is where."""

    disk: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the destination found at a probe's path: the file's bytes, or why there were none."""

    disk: str
    content: bytes | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that one preflight judges.

    `source_host` is the source's name.
    `nonces` are what the source wrote for each disk, `readings` what the destination read there.
    `ownership_error` says why the destination could not keep an ownership record, if it could not. `objections` are
    the destination's driver's.
    """

    guest: GuestFacts
    source_host: str
    host: HostFacts
    nonces: dict[str, bytes]
    readings: tuple[Reading, ...]
    ownership_error: str | None
    objections: tuple[Objection, ...] = ()
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's outcome. `check` is stable; `remedy` is empty when there is nothing to do."""

    check: str
    severity: Severity
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each refusal."""
        return tuple(
            f"{f.found}. {f.remedy}" if f.remedy else f.found
            for f in self.findings
            if f.severity is Severity.REFUSED
        )

    @property
    def is_passed(self) -> bool:
        return not self.problems


def examine(inspection: Inspection) -> PreflightReport:
    """Run every check."""
    findings: list[Finding] = []
    for check in (
        _names,
        _hypervisor,
        _machine,
        _cpu,
        _blockers,
        _objections,
        _storage,
        _ownership,
        _memory,
        _identity,
    ):
        findings.extend(check(inspection))
    return PreflightReport(findings=tuple(findings))


def _names(inspection: Inspection) -> Iterator[Finding]:
    """An ownership record tells hosts apart by their names."""
    source, destination = inspection.source_host, inspection.host.name
    if source != destination:
        yield Finding(
            check="names", severity=Severity.OK, found=f"{source} and {destination} have different names"
        )
    else:
        yield Finding(
            check="names",
            severity=Severity.REFUSED,
            found=f"both hosts are named {source}: neither could tell its own ownership record from the other's",
            remedy="Give each host a name of its own ([agent] name) and a certificate for it",
        )


def _hypervisor(inspection: Inspection) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    if guest.hypervisor == host.hypervisor:
        yield Finding(
            check="hypervisor", severity=Severity.OK, found=f"{host.name} runs {host.hypervisor} guests"
        )
    else:
        yield Finding(
            check="hypervisor",
            severity=Severity.REFUSED,
            found=f"{guest.name} is a guest of {guest.hypervisor}, which {host.name} does not run",
            remedy=f"Enable [guests.{guest.hypervisor}] in the configuration of {host.name}",
        )


def _machine(inspection: Inspection) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    if guest.hypervisor != host.hypervisor:
        return
    if guest.machine in host.machines:
        yield Finding(
            check="machine", severity=Severity.OK, found=f"{host.name} knows the machine {guest.machine}"
        )
        return
    known = ", ".join(host.machines[-MAX_NAMED:]) or "none"
    yield Finding(
        check="machine",
        severity=Severity.REFUSED,
        found=f"{guest.name} is a machine of type {guest.machine}, which {host.name} does not know: it knows {known}",
        remedy=f"Upgrade the hypervisor of {host.name}, or start the guest with one of those types",
    )


def _blockers(inspection: Inspection) -> Iterator[Finding]:
    for blocker in inspection.guest.blockers:
        yield Finding(
            check="guest-blocked",
            severity=Severity.REFUSED,
            found=f"{inspection.guest.name} cannot be moved as it is: {blocker}",
            remedy="Take that device or job away from the guest first",
        )


def _objections(inspection: Inspection) -> Iterator[Finding]:
    for objection in inspection.objections:
        yield Finding(
            check=objection.check,
            severity=Severity.REFUSED,
            found=f"{inspection.host.name}: {objection.found}",
            remedy=objection.remedy,
        )


def _cpu(inspection: Inspection) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    wanted = set(guest.cpu.features)
    same_model = [cpu for cpu in host.cpus if cpu.model == guest.cpu.model]
    fitting = sorted(cpu.model for cpu in host.cpus if wanted <= set(cpu.features))
    advice = (
        f"Models there that have all of them: {', '.join(fitting[:MAX_NAMED])}"
        if fitting
        else "No model there has all of them: start the guest with a smaller CPU model"
    )
    if not same_model:
        yield Finding(
            check="cpu-model",
            severity=Severity.REFUSED,
            found=f"{guest.name} was started with CPU model {guest.cpu.model}, which {host.name} cannot give",
            remedy=advice,
        )
        return
    missing = sorted(wanted - set(same_model[0].features))
    if missing:
        yield Finding(
            check="cpu-features",
            severity=Severity.REFUSED,
            found=f"{host.name}'s {guest.cpu.model} lacks CPU features that {guest.name} uses: {', '.join(missing)}",
            remedy=advice,
        )
    else:
        yield Finding(
            check="cpu-features",
            severity=Severity.OK,
            found=f"{host.name} gives {guest.cpu.model} with all {len(wanted)} features",
        )


def _storage(inspection: Inspection) -> Iterator[Finding]:
    host = inspection.host
    readings = {reading.disk: reading for reading in inspection.readings}
    for disk in inspection.guest.disks:
        reading = readings.get(disk.name)
        nonce = inspection.nonces.get(disk.name)
        if reading is not None and nonce is not None and reading.content == nonce:
            yield Finding(
                check="storage",
                severity=Severity.OK,
                found=f"disk {disk.name} ({disk.path}): a nonce written beside it was read on {host.name}",
            )
            continue
        if nonce is None:
            cause = "no nonce could be written beside it at the source"
        elif reading is None:
            cause = f"{host.name} did not answer for it"
        elif reading.error is not None:
            cause = reading.error
        else:
            cause = f"{host.name} read something else than was written at the source"
        yield Finding(
            check="storage",
            severity=Severity.REFUSED,
            found=f"disk {disk.name} ({disk.path}) is not proved to be the same on {host.name}: {cause}",
            remedy="Mount the same shared storage at the same path on both hosts, and name it in "
            "[storage] shared_dirs of both",
        )


def _ownership(inspection: Inspection) -> Iterator[Finding]:
    host = inspection.host
    nonce = inspection.nonces.get(RECORDS)
    reading = next((reading for reading in inspection.readings if reading.disk == RECORDS), None)
    if (
        inspection.ownership_error is None
        and nonce is not None
        and (reading is None or reading.content != nonce)
    ):
        cause = (reading and reading.error) or "it found something else than was written at the source"
        yield Finding(
            check="ownership",
            severity=Severity.REFUSED,
            found=f"{host.name} is not proved to keep the ownership record in the same place: {cause}",
            remedy="Name the endpoints of the same etcd, and the same prefix, in [storage.etcd] of both hosts",
        )
    elif inspection.ownership_error is None:
        yield Finding(
            check="ownership", severity=Severity.OK, found="both ends keep the same ownership record"
        )
    else:
        yield Finding(
            check="ownership",
            severity=Severity.REFUSED,
            found=f"{host.name} cannot keep the ownership record: {inspection.ownership_error}",
            remedy="Give both agents write access to the directory on the shared storage, or to the same etcd",
        )


def _memory(inspection: Inspection) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    needed = guest.ram_bytes + OVERHEAD_BYTES - inspection.reserved_bytes
    if needed <= host.free_memory_bytes:
        yield Finding(
            check="memory",
            severity=Severity.OK,
            found=f"{host.name} has {host.free_memory_bytes >> 20} MiB free, {max(needed, 0) >> 20} MiB are needed",
        )
    else:
        yield Finding(
            check="memory",
            severity=Severity.REFUSED,
            found=f"{host.name} has {host.free_memory_bytes >> 20} MiB free, and {guest.name} needs "
            f"{needed >> 20} MiB",
            remedy="Free memory there, or choose another host",
        )


def _identity(inspection: Inspection) -> Iterator[Finding]:
    guest, host = inspection.guest, inspection.host
    if guest.guest_id in host.guest_ids:
        yield Finding(
            check="identity",
            severity=Severity.REFUSED,
            found=f"{host.name} already has a guest with the identity {guest.guest_id}",
            remedy="End that guest there, or find out why there are two",
        )
    else:
        yield Finding(
            check="identity", severity=Severity.OK, found=f"{host.name} has no guest of this identity"
        )
