"""CPUs of real QEMU guests, and destinations whose QEMU gives less: what the preflight of two real agents says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from agents.api import Check, CheckReport
from migrate.preflight import Finding, Severity
from tests.agents.host.qemu_guests import QemuGuests, qemu_fleet
from tests.agents.hypervisors.qemu.conftest import needs_qemu, retold_qemu, wrapped_qemu

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt("module"),
    needs_qemu(),
]


async def findings(guests: QemuGuests, word: str) -> Mapping[str, Finding]:
    """The preflight of a move from host-a to host-b: its findings about the CPU."""
    async with guests.fleet.operator("host-a") as channel:
        await channel.send(Check(guest=word, to="host-b"))
        report = await channel.receive()
    assert isinstance(report, CheckReport), report
    return {one.check: one for one in report.findings if one.check.startswith("cpu-")}


def severe(found: Mapping[str, Finding]) -> dict[str, Severity]:
    return {check: one.severity for check, one in found.items() if one.severity is not Severity.OK}


async def test_a_destination_whose_qemu_lacks_features_is_refused_with_models_that_both_have(
    folder: Path,
) -> None:
    wrapped_qemu(folder / "host-b", "-global Nehalem-x86_64-cpu.sse4-2=off -global max-x86_64-cpu.avx2=off")
    async with qemu_fleet(folder) as guests:
        spec, everything = guests.spec(), guests.spec(name="everything", cpu="max")
        await guests.start("host-a", spec, beats=1)
        await guests.start("host-a", everything, beats=1)
        found = await findings(guests, spec.guest_id)
        assert severe(found) == {"cpu-features": Severity.REFUSED}
        assert "sse4.2" in found["cpu-features"].found
        assert "Models of host-a and host-b" in found["cpu-features"].remedy
        assert "Westmere" in found["cpu-features"].remedy
        # The same version of QEMU, and less of it: what `max` is was not proved to be the same.
        found = await findings(guests, everything.guest_id)
        assert severe(found) == {"cpu-features": Severity.REFUSED, "cpu-host-model": Severity.REFUSED}
        assert "avx2" in found["cpu-features"].found


async def test_a_guest_of_all_features_is_warned_of_and_moves_between_equal_hosts(folder: Path) -> None:
    async with qemu_fleet(folder) as guests:
        spec = guests.spec(cpu="max")
        await guests.start("host-a", spec, beats=1)
        found = await findings(guests, spec.guest_id)
        assert severe(found) == {"cpu-host-model": Severity.WARNING}
        report = await guests.move(spec, "host-a", "host-b")
        await guests.check_moved(spec, report, "host-a", "host-b")


async def test_a_guest_without_what_its_host_lacks_passes_and_additions_are_judged(folder: Path) -> None:
    wrapped_qemu(
        folder / "host-b",
        # Everything that could give it: no model of that host has RDRAND.
        " ".join(
            f"-global {model}-x86_64-cpu.rdrand=off" for model in ("max", "Haswell", "IvyBridge", "EPYC")
        ),
    )
    async with qemu_fleet(folder) as guests:
        # TCG has no TSX, PCID or x2APIC: the guest runs without them, and so would it there.
        spec = guests.spec(cpu="Haswell,-rdrand")
        await guests.start("host-a", spec, beats=1)
        assert severe(await findings(guests, spec.guest_id)) == {}
        added = guests.spec(name="added", cpu="Nehalem,+smap")
        await guests.start("host-a", added, beats=1)
        assert severe(await findings(guests, added.guest_id)) == {}


async def test_a_model_that_only_one_qemu_knows_is_refused(folder: Path) -> None:
    retold_qemu(folder / "host-b", r'\{"name": "Nehalem[^}]*\}(, )?', "")
    async with qemu_fleet(folder) as guests:
        spec = guests.spec()
        await guests.start("host-a", spec, beats=1)
        found = await findings(guests, spec.guest_id)
        assert severe(found)["cpu-model"] is Severity.REFUSED
        assert "cpu-features" not in severe(found)
        assert "Westmere" in found["cpu-model"].remedy
