"""CPU models of a real agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.api import CpuView, GetCpus, Refused
from agents.hypervisors.embedded.spec import CPU_MODELS
from tests.agents.host.fleet import running_fleet
from tests.agents.hypervisors.qemu.conftest import needs_qemu

pytestmark = pytest.mark.anyio


async def test_an_agent_tells_the_models_of_its_hypervisor(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        view = await fleet.ask("host-a", GetCpus())
        assert isinstance(view, CpuView)
        (offer,) = view.hypervisors
        assert (offer.host, offer.hypervisor) == ("host-a", "embedded")
        assert {cpu.model for cpu in offer.cpus} == set(CPU_MODELS)
        assert all(cpu.vendor and "sse2" in cpu.features for cpu in offer.cpus)


async def test_who_may_not_view_may_not_see_models(folder: Path) -> None:
    async with running_fleet(folder, rules="") as fleet:
        answer = await fleet.ask("host-a", GetCpus())
        assert isinstance(answer, Refused)
        assert "may not see the CPU models of this host" in answer.text


@pytest.mark.slow
@needs_qemu()
async def test_an_agent_with_qemu_tells_all_of_its_models_in_one_message(folder: Path) -> None:
    async with running_fleet(folder, qemu="\n") as fleet:
        view = await fleet.ask("host-a", GetCpus())
        assert isinstance(view, CpuView)
        offer = next(one for one in view.hypervisors if one.hypervisor == "qemu")
        assert len(offer.cpus) > 100
        assert offer.cpu_host.version
        assert "avx2" in offer.features
