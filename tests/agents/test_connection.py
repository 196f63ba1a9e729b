from __future__ import annotations

from contextlib import aclosing

import anyio
import pytest

from agents.api import (
    CONTROL_SCHEMA,
    Cancel,
    Check,
    CheckReport,
    Done,
    GetHost,
    JobList,
    JobStarted,
    ListGuests,
    ListJobs,
    Move,
    Pause,
    Refused,
    Resolution,
    Resolve,
    Resume,
    SetLimits,
    Watch,
)
from agents.connection import AgentClient
from agents.errors import RequestRefused
from migrate.phases import Phase
from tests.agents.scripted_agent import (
    ScriptedHosts,
    answering,
    guest_facts,
    guest_list,
    host_view,
    silent,
    view,
)
from tests.faults import Fuse, fused_stream_pair
from transport.errors import LocalMisuse, PeerGone, PeerMisbehaved
from transport.wire import MessageChannel

pytestmark = pytest.mark.anyio


async def test_each_method_sends_its_request_and_gives_the_answer() -> None:
    received: list[object] = []
    resolution = Resolution(
        job="j",
        guest_name="vm1",
        phase=Phase.IN_DOUBT,
        record="",
        verdict="",
        runs_on=None,
        is_resolved=False,
    )
    check = CheckReport(guest="vm1", to="host-b", findings=())
    jobs = JobList(host="host-a", jobs=(view(),))
    script = answering(
        host_view("host-a"),
        guest_list("host-a", guest_facts()),
        check,
        JobStarted(job="j"),
        jobs,
        *[Done()] * 4,
        resolution,
        received=received,
    )
    async with ScriptedHosts({"host-a": [script]}) as hosts, hosts.connect("host-a") as agent:
        assert await agent.host() == host_view("host-a")
        assert (await agent.guests()).guests == (guest_facts(),)
        assert await agent.check("vm1", "host-b") == check
        assert await agent.move(Move(guest="vm1", to="host-b")) == "j"
        assert await agent.jobs() == jobs
        await agent.set_limits("j", downtime_limit_s=0.1, bandwidth_bytes_per_s=0)
        await agent.pause("j")
        await agent.resume("j")
        await agent.cancel("j")
        assert await agent.resolve("j", act=True) == resolution
    assert received == [
        GetHost(),
        ListGuests(),
        Check(guest="vm1", to="host-b"),
        Move(guest="vm1", to="host-b"),
        ListJobs(),
        SetLimits(job="j", downtime_limit_s=0.1, bandwidth_bytes_per_s=0),
        Pause(job="j"),
        Resume(job="j"),
        Cancel(job="j"),
        Resolve(job="j", act=True),
    ]


async def test_a_refusal_carries_its_code_and_words_and_the_connection_lives() -> None:
    script = answering(Refused(code="busy", text="4 migrations leave already"), host_view("host-a"))
    async with ScriptedHosts({"host-a": [script]}) as hosts, hosts.connect("host-a") as agent:
        with pytest.raises(RequestRefused) as caught:
            await agent.move(Move(guest="vm1", to="host-b"))
        assert (caught.value.host, caught.value.code) == ("host-a", "busy")
        assert str(caught.value) == "host-a refuses: 4 migrations leave already"
        assert (await agent.host()).name == "host-a"


async def test_an_answer_to_another_question_is_misbehaviour() -> None:
    async with ScriptedHosts({"host-a": [answering(Done())]}) as hosts, hosts.connect("host-a") as agent:
        with pytest.raises(PeerMisbehaved, match="answered with Done where HostView was due"):
            await agent.host()
        with pytest.raises(PeerGone, match="given up in the middle"):
            await agent.host()


async def test_garbage_is_misbehaviour() -> None:
    ours, theirs = fused_stream_pair(Fuse())
    async with AgentClient("host-a", MessageChannel(ours, CONTROL_SCHEMA)) as agent:
        await theirs.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(PeerMisbehaved):
            await agent.host()
    await theirs.aclose()


async def test_silence_ends_a_request_at_its_deadline_and_the_connection_with_it() -> None:
    async with ScriptedHosts({"host-a": [silent]}, timeout_s=0.2) as hosts, hosts.connect("host-a") as agent:
        with pytest.raises(PeerGone, match="host-a did not answer within") as caught:
            await agent.host()
        assert caught.value.may_have_reached_peer
        with pytest.raises(PeerGone) as again:
            await agent.host()
        assert not again.value.may_have_reached_peer


async def test_a_broken_link_names_the_host() -> None:
    async with ScriptedHosts({"host-a": [answering()]}) as hosts, hosts.connect("host-a") as agent:
        with pytest.raises(PeerGone, match=r"^host-a: "):
            await agent.host()


async def test_a_cancelled_request_leaves_the_connection_out_of_step() -> None:
    async with ScriptedHosts({"host-a": [silent]}) as hosts, hosts.connect("host-a") as agent:
        with anyio.move_on_after(0.01):
            await agent.host()
        with pytest.raises(PeerGone, match="given up"):
            await agent.host()


async def test_two_requests_at_once_are_our_own_mistake() -> None:
    async with (
        ScriptedHosts({"host-a": [silent]}) as hosts,
        hosts.connect("host-a") as agent,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(agent.host)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(LocalMisuse):
            await agent.guests()
        tasks.cancel_scope.cancel()


async def test_a_watch_gives_every_view_and_leaves_a_usable_connection() -> None:
    views = (view(Phase.SETUP), view(), view(Phase.COMPLETE, has_ended=True))
    received: list[object] = []
    script = answering(views, Done(), received=received)
    async with ScriptedHosts({"host-a": [script]}) as hosts, hosts.connect("host-a") as agent:
        async with aclosing(agent.watch("j")) as watched:
            assert [one async for one in watched] == list(views)
        await agent.pause("j")
    assert received == [Watch(job="j"), Pause(job="j")]


async def test_a_watch_that_is_left_early_takes_the_connection_with_it() -> None:
    async with (
        ScriptedHosts({"host-a": [answering((view(), view()), Done())]}) as hosts,
        hosts.connect("host-a") as agent,
    ):
        async with aclosing(agent.watch("j")) as watched:
            async for _ in watched:
                break
        with pytest.raises(PeerGone, match="given up"):
            await agent.pause("j")


async def test_a_watch_of_silence_ends_at_its_deadline() -> None:
    async def once(channel: MessageChannel) -> None:
        await channel.receive()
        await channel.send(view())
        await channel.receive()

    async with (
        ScriptedHosts({"host-a": [once]}) as hosts,
        hosts.connect("host-a") as agent,
        aclosing(agent.watch("j", silence_s=0.02)) as watched,
    ):
        assert await anext(watched) == view()
        with pytest.raises(PeerGone, match="did not answer"):
            await anext(watched)


async def test_a_watch_of_an_unknown_job_is_refused() -> None:
    script = answering(Refused(code="unknown-job", text="no job j"))
    async with (
        ScriptedHosts({"host-a": [script]}) as hosts,
        hosts.connect("host-a") as agent,
        aclosing(agent.watch("j")) as watched,
    ):
        with pytest.raises(RequestRefused, match="no job j"):
            await anext(watched)
