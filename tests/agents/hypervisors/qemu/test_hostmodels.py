"""What a real QEMU gives: without what this host lacks, one spelling each, and kept until the binary changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agents.hypervisors.kvm import KvmCpu
from agents.hypervisors.qemu.describe import cpu_of_properties
from agents.hypervisors.qemu.errors import QemuGone
from agents.hypervisors.qemu.hostmodels import HostModels, ModelCatalog
from agents.hypervisors.qemu.spec import Accel
from migrate.cpunames import canonical_all
from migrate.facts import CpuFacts, HostCpuFacts
from migrate.preflight.cpufit import models_with
from tests.agents.hypervisors.qemu.conftest import QEMU, needs_qemu, wrapped_qemu

pytestmark = pytest.mark.anyio


def cpus(models: HostModels) -> dict[str, CpuFacts]:
    return {cpu.model: cpu for cpu in models.cpus}


@pytest.mark.slow
@needs_qemu()
async def test_a_model_has_what_this_host_can_give_of_it() -> None:
    models = await ModelCatalog(QEMU).of(Accel.TCG)
    by_name = cpus(models)
    haswell = by_name["Haswell"]
    # TCG emulates no TSX and no PCID, whatever the model's definition says.
    assert {"avx2", "sse4.1", "pni"} <= set(haswell.features)
    assert not {"hle", "rtm", "pcid", "tsc-deadline"} & set(haswell.features)
    assert (haswell.vendor, haswell.family, haswell.number, haswell.stepping) == ("GenuineIntel", 6, 60, 4)
    assert not haswell.is_host_dependent
    assert by_name["max"].is_host_dependent
    assert "host" not in by_name
    assert models.own is None
    for cpu in models.cpus:
        assert cpu.features == canonical_all(cpu.features)
        assert set(cpu.features) <= set(models.features)


@pytest.mark.slow
@needs_qemu()
async def test_features_that_a_host_takes_away_are_gone(tmp_path: Path) -> None:
    binary = wrapped_qemu(tmp_path, "-global max-x86_64-cpu.avx2=off -global Nehalem-x86_64-cpu.sse4-2=off")
    catalog = ModelCatalog(binary)
    by_name = cpus(await catalog.of(Accel.TCG))
    assert "avx2" not in by_name["max"].features
    assert "sse4.2" not in by_name["Nehalem"].features
    assert "sse4.2" in by_name["Westmere"].features
    # Another binary is asked anew.
    wrapped_qemu(tmp_path, "-global Westmere-x86_64-cpu.sse4-2=off")
    os.utime(binary, (1, 1))
    assert "sse4.2" not in cpus(await catalog.of(Accel.TCG))["Westmere"].features


async def test_a_binary_that_is_missing_is_said() -> None:
    with pytest.raises(QemuGone, match="is missing"):
        await ModelCatalog(Path("/nonexistent/qemu")).of(Accel.TCG)


MODELS = HostModels(
    cpus=(
        CpuFacts(model="large", features=("a", "b", "c")),
        CpuFacts(model="max", features=("a", "b", "c"), is_host_dependent=True),
        CpuFacts(model="near", features=("a", "b")),
        CpuFacts(model="small", features=("a",)),
    ),
    features=("a", "b", "c"),
    own=CpuFacts(model="host", features=(), vendor="MakerOfChips", family=7, number=3),
    machines=(),
    version="7.2.0",
)


def test_alternatives_have_all_that_a_guest_has_the_nearest_first() -> None:
    assert models_with(("b",), MODELS.cpus) == ("near", "large")
    assert models_with(("z",), MODELS.cpus) == ()


def test_the_hosts_own_cpu_is_what_kvm_says_and_else_qemus_model_of_it() -> None:
    assert MODELS.cpu_host(None) == HostCpuFacts(version="7.2.0", features=("a", "b", "c"))
    silent = MODELS.cpu_host(KvmCpu())
    assert (silent.is_native, silent.vendor, silent.family, silent.number) == (True, "MakerOfChips", 7, 3)
    assert (silent.tsc_khz, silent.has_tsc_scaling) == (0, None)
    kvm = KvmCpu(vendor="Other", family=6, number=60, tsc_khz=2_000_000, has_tsc_scaling=True)
    told = MODELS.cpu_host(kvm)
    assert (told.vendor, told.family, told.number) == ("Other", 6, 60)
    assert (told.tsc_khz, told.has_tsc_scaling) == (2_000_000, True)


def test_properties_that_are_nonsense_are_unknown() -> None:
    nonsense = {
        "vendor": "x" * 13,
        "family": True,
        "model": -1,
        "stepping": 1 << 32,
        "level": "7",
        "xlevel": None,
    }
    assert cpu_of_properties("m", ("a",), nonsense) == CpuFacts(model="m", features=("a",))  # type: ignore[arg-type]
    assert cpu_of_properties("m", (), None) == CpuFacts(model="m", features=())
