"""CPUs of guests against QEMUs that give less: the real one with arguments of its own, or with answers left out."""

from __future__ import annotations

from agents.api import CheckReport
from tests.agents.hypervisors.qemu.conftest import wrapped_qemu
from tests.agents.hypervisors.qemu.impostor import write_impostor
from tests.preflight.cases import fits, problem, warned
from tests.preflight.stage import Build


async def check_of(build: Build, cpu: str, there: str) -> CheckReport:
    """Check a guest of this CPU against a host whose QEMU has these arguments besides."""
    wrapped_qemu(build.folder / "host-b", there)
    async with build(qemu="\n") as stage:
        return await stage.check(await stage.qemu(cpu=cpu))


@fits
async def a_named_model_and_hosts_that_have_all_of_it(build: Build) -> CheckReport:
    return await check_of(build, "Haswell", "")


@fits
async def a_feature_that_is_missing_there_and_that_the_guest_was_started_without(build: Build) -> CheckReport:
    lacks = " ".join(f"-global {model}-x86_64-cpu.rdrand=off" for model in ("max", "Haswell", "IvyBridge"))
    return await check_of(build, "Haswell,-rdrand", lacks)


@fits
async def a_feature_that_was_added_and_that_both_have(build: Build) -> CheckReport:
    return await check_of(build, "Nehalem,+smap", "")


@fits
async def a_model_of_the_other_maker_under_emulation(build: Build) -> CheckReport:
    return await check_of(build, "EPYC", "")


@problem("cpu-features")
async def a_model_that_lacks_a_feature_there(build: Build) -> CheckReport:
    lacks = "-global Nehalem-x86_64-cpu.sse4-2=off -global max-x86_64-cpu.sse4-2=off"
    return await check_of(build, "Nehalem", lacks)


@problem("cpu-features", "cpu-host-model")
async def all_features_of_the_host_and_another_host_with_less(build: Build) -> CheckReport:
    return await check_of(build, "max", "-global max-x86_64-cpu.avx2=off")


@warned("cpu-host-model")
async def all_features_of_the_host_between_equal_hosts(build: Build) -> CheckReport:
    return await check_of(build, "max", "")


@problem("cpu-host-model")
async def all_features_of_the_host_and_another_release(build: Build) -> CheckReport:
    other = write_impostor(build.folder / "qemu", version=(7, 2, 99))
    async with build(qemu={"host-a": "\n", "host-b": f'binary = "{other}"\n'}) as stage:
        return await stage.check(await stage.qemu(cpu="max"))


@problem("cpu-model")
async def a_model_that_is_not_known_there(build: Build) -> CheckReport:
    names = ("Nehalem", *(f"Nehalem-v{number}" for number in (1, 2)))
    other = write_impostor(build.folder / "qemu", version=(7, 2, 22), hidden=names)
    async with build(qemu={"host-a": "\n", "host-b": f'binary = "{other}"\n'}) as stage:
        return await stage.check(await stage.qemu())


@problem("cpu-features", "cpu-nested")
async def a_guest_that_runs_guests_and_a_host_that_cannot(build: Build) -> CheckReport:
    lacks = " ".join(f"-global {model}-x86_64-cpu.svm=off" for model in ("max", "EPYC"))
    return await check_of(build, "EPYC", lacks)


@problem("cpu-features", "cpu-xsave")
async def register_state_that_the_other_host_does_not_hold(build: Build) -> CheckReport:
    lacks = " ".join(
        f"-global {model}-x86_64-cpu.{feature}=off"
        for model in ("max", "Haswell")
        for feature in ("xsave", "avx", "avx2")
    )
    return await check_of(build, "Haswell", lacks)
