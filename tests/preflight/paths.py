"""Networks between the hosts: what does not get through, what is slow, and what is far."""

from __future__ import annotations

from agents.api import CheckReport
from agents.demo.proxy import Proxy
from tests.agents.host.ways import FRONT, Delayed, HangsUp, OnlyGreetings, through
from tests.preflight.cases import fits, problem, warned
from tests.preflight.stage import Build

BEHIND = {"fronts": {"host-b": FRONT}}


@problem("reachable")
async def an_agent_that_nobody_hears(build: Build) -> CheckReport:
    async with build(**BEHIND) as stage:
        return await stage.check(await stage.embedded())


@problem("reachable")
async def a_data_port_that_is_closed(build: Build) -> CheckReport:
    async with build(**BEHIND) as stage:
        guest = await stage.embedded()
        async with through(stage.fleet, None):
            return await stage.check(guest)


@problem("reachable")
async def somebody_else_behind_the_data_port(build: Build) -> CheckReport:
    async with build(**BEHIND) as stage:
        guest = await stage.embedded()
        async with through(stage.fleet, HangsUp("127.0.0.1")):
            return await stage.check(guest, measures=True)


@problem("throughput")
async def a_path_on_which_only_small_packets_pass(build: Build) -> CheckReport:
    async with build(**BEHIND) as stage:
        guest = await stage.embedded()
        async with through(stage.fleet, OnlyGreetings("127.0.0.1")):
            return await stage.check(guest, measures=True)


@warned("round-trip")
async def a_host_that_is_far(build: Build) -> CheckReport:
    async with build(**BEHIND) as stage:
        guest = await stage.embedded()
        async with through(stage.fleet, Proxy("127.0.0.1"), control=Delayed(0.03)):
            return await stage.check(guest)


@fits
async def a_path_that_was_measured(build: Build) -> CheckReport:
    async with build() as stage:
        return await stage.check(await stage.embedded(), measures=True)


@fits
async def a_path_with_something_in_between(build: Build) -> CheckReport:
    async with build(**BEHIND) as stage:
        guest = await stage.embedded()
        async with through(stage.fleet, Proxy("127.0.0.1")):
            return await stage.check(guest, measures=True)
