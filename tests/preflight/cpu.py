"""CPUs: guests that were started with more than the destination's QEMU gives, or with something else.

What a real host lacks is taken from its QEMU by arguments of its command line; what QEMU says of itself is changed on
the way to the agent. Features that come with microcode need hardware: TCG has none of them.
"""

from __future__ import annotations

from agents.api import CheckReport
from tests.agents.hypervisors.qemu.conftest import retold_qemu, wrapped_qemu
from tests.preflight.cases import fits, problem, warned
from tests.preflight.stage import Build


async def _check(build: Build, cpu: str, *without: str) -> CheckReport:
    """A guest with this CPU, and a destination whose models are changed so: MODEL.PROPERTY=VALUE."""
    changes = (one.partition(".") for one in without)
    arguments = " ".join(f"-global {model}-x86_64-cpu.{change}" for model, _, change in changes)
    wrapped_qemu(build.folder / "host-b", arguments)
    async with build(qemu="\n") as stage:
        return await stage.check(await stage.qemu(cpu=cpu))


async def _check_retold(build: Build, cpu: str, pattern: str, instead: str) -> CheckReport:
    retold_qemu(build.folder / "host-b", pattern, instead)
    async with build(qemu="\n") as stage:
        return await stage.check(await stage.qemu(cpu=cpu))


@fits
async def a_named_model_that_both_hosts_have(build: Build) -> CheckReport:
    return await _check(build, "Nehalem")


@fits
async def a_model_whose_missing_features_are_missing_at_both_ends(build: Build) -> CheckReport:
    return await _check(build, "Haswell")


@fits
async def a_feature_beside_the_model_that_both_can_give(build: Build) -> CheckReport:
    return await _check(build, "Nehalem,+smap,-popcnt")


@fits
async def a_model_of_the_other_maker_under_emulation(build: Build) -> CheckReport:
    return await _check(build, "EPYC")


@problem("cpu-features")
async def a_model_that_has_less_there(build: Build) -> CheckReport:
    return await _check(build, "Nehalem", "Nehalem.sse4-2=off")


@problem("cpu-model")
async def a_model_that_is_not_known_there(build: Build) -> CheckReport:
    return await _check_retold(build, "Nehalem", r'\{"name": "Nehalem[^}]*\}(, )?', "")


@problem("cpu-features", "cpu-host-model")
async def everything_that_the_host_gives_and_less_of_it_there(build: Build) -> CheckReport:
    return await _check(build, "max", "max.avx2=off")


@problem("cpu-host-model")
async def everything_that_the_host_gives_and_another_version_there(build: Build) -> CheckReport:
    return await _check_retold(build, "max", r'"micro": \d+, "minor": \d+', '"micro": 0, "minor": 99')


@warned("cpu-host-model")
async def everything_that_the_host_gives_and_the_same_there(build: Build) -> CheckReport:
    return await _check(build, "max")


@problem("cpu-vendor")
async def a_model_of_another_maker_there(build: Build) -> CheckReport:
    return await _check(build, "Nehalem", "Nehalem.vendor=AuthenticAMD")


@problem("cpu-vendor", "cpu-host-model")
async def everything_that_the_host_gives_and_another_maker_there(build: Build) -> CheckReport:
    return await _check(build, "max", "max.vendor=GenuineIntel")


@warned("cpu-family")
async def a_model_of_another_number_there(build: Build) -> CheckReport:
    return await _check(build, "Nehalem", "Nehalem.model=30")


@problem("cpu-features", "cpu-xsave")
async def register_state_that_is_nowhere_there(build: Build) -> CheckReport:
    return await _check(build, "Haswell", "Haswell.xsave=off")


@problem("cpu-features", "cpu-nested")
async def no_nested_virtualisation_there(build: Build) -> CheckReport:
    return await _check(build, "EPYC", "EPYC.svm=off")
