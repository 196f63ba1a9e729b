"""Devices, machine, firmware and names: each problem is a finding of its own, and nonsense is no crash."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.facts import (
    DeviceFacts,
    DeviceKind,
    FileFacts,
    FirmwareFacts,
    GuestHardware,
    HostHardware,
    Objection,
    RomFacts,
)
from migrate.preflight import Finding, Inspection, Severity, examine
from migrate.preflight.devices import OBJECTIONS
from migrate.preflight.hardware import TIED
from migrate.preflight.machine import MAX_MAJORS_AHEAD
from tests.migrate.test_preflight import GOOD, HOST
from tests.migrate.world import FACTS

OK, WARNING, REFUSED, UNKNOWN = Severity.OK, Severity.WARNING, Severity.REFUSED, Severity.UNKNOWN


def guest(**changes: object) -> Inspection:
    hardware = replace(FACTS.hardware, **changes)  # type: ignore[arg-type]
    return replace(GOOD, guest=replace(FACTS, hardware=hardware))


def pair(of_guest: dict[str, object], of_host: dict[str, object]) -> Inspection:
    there = replace(HOST.hardware, **of_host)  # type: ignore[arg-type]
    return replace(guest(**of_guest), host=replace(HOST, hardware=there))


def of(inspection: Inspection, check: str) -> list[Finding]:
    return [one for one in examine(inspection).findings if one.check == check]


def bad(inspection: Inspection) -> list[tuple[str, Severity]]:
    return [(one.check, one.severity) for one in examine(inspection).findings if one.severity is not OK]


def device(kind: str, name: str = "dev0", tie: str = "") -> DeviceFacts:
    return DeviceFacts(name=name, type="fake-disk", kind=kind, tie=tie)


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize("kind", TIED)
def test_each_tied_device_is_refused_by_the_check_of_its_kind_alone(kind: DeviceKind) -> None:
    inspection = guest(devices=(device(kind.value, "dev7", "0000:01:00.0"),))
    assert bad(inspection) == [(kind.value, REFUSED)]
    (finding,) = of(inspection, kind.value)
    for words in ("dev7", "fake-disk", "0000:01:00.0", "host-a"):
        assert words in finding.found


def test_three_tied_devices_are_three_findings() -> None:
    devices = tuple(device(kind, f"dev{n}") for n, kind in enumerate(["tpm", "passthrough", "passthrough"]))
    assert bad(guest(devices=devices)) == [
        ("passthrough", REFUSED),
        ("passthrough", REFUSED),
        ("tpm", REFUSED),
    ]


def test_every_kind_but_emulated_has_a_check_of_its_name() -> None:
    assert set(TIED) == set(DeviceKind) - {DeviceKind.EMULATED}
    assert all(check.check_id == kind for kind, check in TIED.items())


def test_a_kind_that_only_a_newer_agent_knows_is_judged_by_its_type() -> None:
    assert bad(guest(devices=(device("teleport"),))) == []
    unheard = DeviceFacts(name="x", type="teleporter", kind="teleport")
    assert bad(guest(devices=(unheard,))) == [("device-types", REFUSED)]


def test_each_missing_type_of_device_is_a_finding_with_all_devices_of_it() -> None:
    devices = tuple(
        DeviceFacts(name=name, type=kind, kind="emulated")
        for name, kind in (("a", "card-x"), ("b", "card-x"), ("c", "card-y"), ("d", "fake-disk"))
    )
    found = of(guest(devices=devices), "device-types")
    assert [one.severity for one in found] == [REFUSED, REFUSED]
    assert "a, b of type card-x" in found[0].found
    assert "1.0" in found[0].found


def test_types_that_the_destination_does_not_tell_are_unknown() -> None:
    inspection = replace(GOOD, host=replace(HOST, hardware=HostHardware()))
    assert [one.severity for one in of(inspection, "device-types")] == [UNKNOWN]


def test_devices_that_were_left_out_are_refused() -> None:
    assert bad(guest(more_devices=1)) == [("device-types", REFUSED)]


def test_a_guest_without_a_description_is_refused_once_and_what_needs_one_is_unknown() -> None:
    undescribed = replace(FACTS, spec=b"", blockers=("-usb", "-rtc"))
    inspection = replace(GOOD, guest=undescribed)
    assert [check for check, severity in bad(inspection) if severity is REFUSED] == ["guest-blocked"] * 2
    assert [check for check, severity in bad(inspection) if severity is UNKNOWN] == list(OBJECTIONS)
    # It never passes, whoever forgot to say why.
    silent = replace(GOOD, guest=replace(undescribed, blockers=()))
    assert ("guest-blocked", REFUSED) in bad(silent)


def test_each_interface_has_its_own_finding() -> None:
    objections = tuple(
        Objection(check="network-backend", found=f"there is no bridge br{n} here", remedy="") for n in (0, 1)
    )
    found = of(replace(GOOD, objections=objections), "network-backend")
    assert [one.found for one in found] == [
        "host-b: there is no bridge br0 here",
        "host-b: there is no bridge br1 here",
    ]


# ---------------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("here", "there", "severity"),
    [
        ("7.2.22", "7.2.22", OK),
        ("7.2.22", "7.2.1", OK),
        ("7.2.22", "8.0.0", OK),
        ("7.2.22", f"{7 + MAX_MAJORS_AHEAD}.0.0", OK),
        ("7.2.22", f"{8 + MAX_MAJORS_AHEAD}.0.0", WARNING),
        ("7.2.22", "7.1.99", REFUSED),
        ("7.2.22", "6.9.0", REFUSED),
        ("10.0.0", "9.2.0", REFUSED),
        ("10.0", "10.1", OK),
        ("", "7.2.0", UNKNOWN),
        ("7.2.0", "", UNKNOWN),
        ("7.2.0", "v7.2.0-rc1", UNKNOWN),
        ("None.None.None", "7.2.0", UNKNOWN),
        ("9" * 5000 + ".1", "7.2.0", UNKNOWN),
    ],
)
def test_a_destination_may_be_newer_and_not_older(here: str, there: str, severity: Severity) -> None:
    inspection = pair({"version": here}, {"version": there})
    (finding,) = of(inspection, "hypervisor-version")
    assert finding.severity is severity
    if severity is REFUSED:
        assert here in finding.found
        assert there in finding.found


def test_a_machine_type_that_will_go_is_a_warning() -> None:
    assert bad(pair({}, {"deprecated_machines": (FACTS.machine,)})) == [("machine", WARNING)]


def test_a_machine_type_that_is_not_known_is_not_called_missing() -> None:
    assert bad(replace(GOOD, guest=replace(FACTS, machine=""))) == [("machine", UNKNOWN)]


@pytest.mark.parametrize(
    ("wanted", "there", "severity"),
    [
        ((), (), OK),
        ((0, 1), (0, 1), OK),
        ((1,), (0,), WARNING),
        ((1,), (), UNKNOWN),
    ],
)
def test_ram_that_is_bound_to_nodes_wants_them_there(
    wanted: tuple[int, ...], there: tuple[int, ...], severity: Severity
) -> None:
    (finding,) = of(pair({"memory_nodes": wanted}, {"memory_nodes": there}), "numa")
    assert finding.severity is severity


# ---------------------------------------------------------------------- firmware

BIOS = RomFacts(name="bios", size_bytes=256 << 10, sha256="aa")


@pytest.mark.parametrize(
    ("there", "severity", "words"),
    [
        ((BIOS,), OK, "1 images"),
        ((replace(BIOS, sha256="bb"),), OK, "bios there is another version"),
        ((replace(BIOS, sha256=""),), OK, ""),
        (
            (replace(BIOS, size_bytes=128 << 10),),
            REFUSED,
            "256 KiB of guest's memory, and would take 128 KiB",
        ),
        ((RomFacts(name="other", size_bytes=1),), REFUSED, "does not find"),
        ((), UNKNOWN, "does not say"),
    ],
)
def test_firmware_must_take_the_same_memory(
    there: tuple[RomFacts, ...], severity: Severity, words: str
) -> None:
    (finding,) = of(pair({"roms": (BIOS,)}, {"roms": there}), "firmware")
    assert finding.severity is severity
    assert words in finding.found


CODE = FileFacts(role="code", path="/shared/code.fd", is_shared=True, size_bytes=4, sha256="aa")
VARS = replace(CODE, role="variables", path="/shared/vars.fd", sha256="cc")


def uefi(*files: FileFacts) -> FirmwareFacts:
    return FirmwareFacts(kind="uefi", files=files)


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        (uefi(CODE, VARS), uefi(CODE, VARS), []),
        (uefi(CODE, VARS), uefi(CODE, replace(VARS, sha256="dd")), ["another file on host-b"]),
        (uefi(CODE, VARS), uefi(CODE), ["did not answer"]),
        (uefi(CODE, VARS), None, ["did not answer", "did not answer"]),
        (
            uefi(replace(CODE, is_shared=False), replace(VARS, is_shared=False)),
            uefi(CODE, VARS),
            ["no shared storage of host-a", "no shared storage of host-a"],
        ),
        (uefi(CODE), uefi(replace(CODE, is_shared=False)), ["no shared storage of host-b"]),
        (uefi(CODE), uefi(replace(CODE, path="/other")), ["no shared storage of host-b"]),
        (uefi(CODE), uefi(replace(CODE, error="no such file")), ["host-b: no such file"]),
        (uefi(replace(CODE, error="EIO")), uefi(CODE), ["host-a: EIO"]),
        (uefi(replace(CODE, sha256="")), uefi(replace(CODE, sha256="")), ["another file"]),
    ],
)
def test_firmware_of_its_own_must_be_the_same_files(
    here: FirmwareFacts, there: FirmwareFacts | None, words: list[str]
) -> None:
    found = of(pair({"firmware": here}, {"firmware": there}), "firmware")
    assert [one.severity for one in found] == ([REFUSED] * len(words) or [OK])
    for one, wanted in zip(found, words, strict=False):
        assert wanted in one.found


# ---------------------------------------------------------------------- names and nonsense


def test_another_guest_of_the_same_name_is_a_warning() -> None:
    assert bad(pair({}, {"guest_names": ("other", FACTS.name)})) == [("name", WARNING)]


WORDS = st.text(max_size=20)
ROMS = st.lists(
    st.builds(RomFacts, name=WORDS, size_bytes=st.integers(-5, 1 << 63), sha256=WORDS), max_size=3
).map(tuple)
FIRMWARE = st.none() | st.builds(
    FirmwareFacts,
    kind=WORDS,
    files=st.lists(st.builds(FileFacts, role=st.sampled_from(["code", "x"]), path=WORDS), max_size=3).map(
        tuple
    ),
)
NODES = st.lists(st.integers(-(1 << 63), 1 << 64), max_size=3).map(tuple)
DEVICES = st.lists(
    st.builds(DeviceFacts, name=WORDS, type=WORDS, kind=WORDS | st.sampled_from(DeviceKind), tie=WORDS),
    max_size=4,
).map(tuple)
LISTS = st.lists(WORDS, max_size=3).map(tuple)


@given(
    st.builds(
        GuestHardware,
        version=WORDS,
        devices=DEVICES,
        more_devices=st.integers(-1, 1 << 64),
        memory_nodes=NODES,
        roms=ROMS,
        firmware=FIRMWARE,
    ),
    st.builds(
        HostHardware,
        version=WORDS,
        device_types=LISTS,
        deprecated_machines=LISTS,
        memory_nodes=NODES,
        roms=ROMS,
        firmware=FIRMWARE,
        guest_names=LISTS,
    ),
)
def test_whatever_the_facts_are_every_check_says_something(
    of_guest: GuestHardware, of_host: HostHardware
) -> None:
    inspection = replace(GOOD, guest=replace(FACTS, hardware=of_guest), host=replace(HOST, hardware=of_host))
    findings = examine(inspection).findings
    assert {one.check for one in findings} == {one.check for one in examine(GOOD).findings}
    assert all(one.found for one in findings)
