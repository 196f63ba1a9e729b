from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import pytest
from anyio.abc import SocketAttribute, SocketStream

from agents.demo.cutter import MIN_CUT_CHUNK_BYTES, MIN_CUT_GAP_S, CutPlan, Cutter

pytestmark = pytest.mark.anyio

PAGES = bytes(range(256)) * 64


@asynccontextmanager
async def server(port: int) -> AsyncIterator[anyio.abc.ObjectReceiveStream[SocketStream]]:
    """Listen where the cutter leads to, and give each connection that arrives."""
    send, receive = anyio.create_memory_object_stream[SocketStream](8)
    async with (
        send,
        receive,
        await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port) as listener,
        anyio.create_task_group() as tasks,
    ):
        released = anyio.Event()

        async def take(stream: SocketStream) -> None:
            async with stream:
                await send.send(stream)
                await released.wait()

        tasks.start_soon(listener.serve, take)
        yield receive
        released.set()
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def serving_cutter() -> AsyncIterator[Cutter]:
    async with Cutter.open("127.0.0.2", "127.0.0.1", ports=2) as cutter, anyio.create_task_group() as tasks:
        tasks.start_soon(cutter.serve)
        yield cutter
        tasks.cancel_scope.cancel()


async def receive_all(stream: SocketStream) -> bytes:
    """Receive until the connection is over, in whatever way."""
    got = bytearray()
    try:
        while True:
            got += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return bytes(got)


async def receive_exactly(stream: SocketStream, length: int) -> bytes:
    got = bytearray()
    while len(got) < length:
        got += await stream.receive(length - len(got))
    return bytes(got)


async def test_bytes_and_farewells_pass_in_both_directions() -> None:
    with anyio.fail_after(10):
        async with serving_cutter() as cutter, server(cutter.ports[1]) as arrivals:
            async with await anyio.connect_tcp("127.0.0.2", cutter.ports[1]) as near:
                await near.send(PAGES)
                await near.send_eof()
                far = await arrivals.receive()
                assert await receive_all(far) == PAGES
                await far.send(b"answer")
                await far.send_eof()
                assert await receive_all(near) == b"answer"
            assert cutter.cuts == 0
            assert cutter.forwarded_bytes == len(PAGES) + len(b"answer")


async def test_a_cut_ends_all_connections_in_the_middle_of_a_chunk_and_new_ones_work() -> None:
    with anyio.fail_after(10):
        async with (
            serving_cutter() as cutter,
            server(cutter.ports[0]) as controls,
            server(cutter.ports[1]) as datas,
        ):
            async with (
                await anyio.connect_tcp("127.0.0.2", cutter.ports[0]) as control,
                await anyio.connect_tcp("127.0.0.2", cutter.ports[1]) as data,
            ):
                await control.send(b"hello")
                await data.send(b"hello")
                far_control, far_data = await controls.receive(), await datas.receive()
                assert await receive_exactly(far_control, 5) == await receive_exactly(far_data, 5) == b"hello"
                cutter.cut_soon()
                await data.send(PAGES)
                assert len(await receive_all(far_data)) < len(PAGES)
                assert await receive_all(far_control) == b""
                assert await receive_all(control) == b""
                assert await receive_all(data) == b""
            assert cutter.cuts == 1
            async with await anyio.connect_tcp("127.0.0.2", cutter.ports[1]) as data:
                await data.send(PAGES)
                assert await receive_exactly(await datas.receive(), len(PAGES)) == PAGES
            assert cutter.cuts == 1


async def test_small_messages_are_not_where_a_cut_falls() -> None:
    small = bytes(MIN_CUT_CHUNK_BYTES - 1)
    with anyio.fail_after(10):
        async with serving_cutter() as cutter, server(cutter.ports[1]) as arrivals:
            cutter.cut_soon()
            async with await anyio.connect_tcp("127.0.0.2", cutter.ports[1]) as near:
                await near.send(small)
                far = await arrivals.receive()
                assert await receive_exactly(far, len(small)) == small
                assert cutter.cuts == 0
                await near.send(small + b"x")
                assert await receive_all(near) == b""
                assert cutter.cuts == 1


async def test_who_dials_while_nobody_listens_behind_is_hung_up_on() -> None:
    with anyio.fail_after(10):
        async with serving_cutter() as cutter, await anyio.connect_tcp("127.0.0.2", cutter.ports[0]) as near:
            assert await receive_all(near) == b""


async def test_its_ports_are_its_own_on_one_address_alone() -> None:
    async with Cutter.open("127.0.0.2", "127.0.0.1", ports=2) as cutter:
        assert len(set(cutter.ports)) == 2
        async with await anyio.create_tcp_listener(
            local_host="127.0.0.1", local_port=cutter.ports[0]
        ) as other:
            assert other.extra(SocketAttribute.local_port) == cutter.ports[0]


class TestPlan:
    """The plan alone: no link."""

    def cuts_at(self, cuts: int, remaining: list[int], *, step_s: float = 1.0) -> list[int]:
        plan, made, cut_at = CutPlan(cuts), 0, []
        for number, remaining_pages in enumerate(remaining):
            if plan.is_due(round_number=0, remaining_pages=remaining_pages, made=made, now_s=number * step_s):
                made += 1
                cut_at.append(remaining_pages)
        return cut_at

    async def test_cuts_are_spread_evenly_over_the_first_pass(self) -> None:
        assert self.cuts_at(3, list(range(400, -1, -1))) == [300, 200, 100]

    async def test_no_cut_comes_before_the_first_page_is_known(self) -> None:
        assert self.cuts_at(1, [0, 0, 0]) == []

    async def test_no_cut_was_asked_for_and_none_is_made(self) -> None:
        assert self.cuts_at(0, [100, 50, 0]) == []

    async def test_cuts_that_are_late_keep_their_distance(self) -> None:
        assert len(self.cuts_at(3, [100, 0, 0, 0, 0, 0], step_s=MIN_CUT_GAP_S)) == 3
        assert len(self.cuts_at(3, [100, 0, 0, 0, 0, 0], step_s=MIN_CUT_GAP_S * 0.49)) == 2

    async def test_what_the_first_pass_missed_is_cut_in_later_rounds(self) -> None:
        plan = CutPlan(1)
        assert not plan.is_due(round_number=0, remaining_pages=100, made=0, now_s=0.0)
        assert plan.is_due(round_number=1, remaining_pages=7, made=0, now_s=1.0)
        assert not plan.is_due(round_number=2, remaining_pages=7, made=1, now_s=2.0)
