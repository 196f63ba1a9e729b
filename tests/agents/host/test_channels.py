from __future__ import annotations

import contextlib

import anyio
import pytest

from agents.host.channels import MAX_CHANNELS_PER_PEER, Channels
from transport.tls import Identity, Role

EVA = Identity(role=Role.OPERATOR, name="eva")
BOB = Identity(role=Role.OPERATOR, name="bob")

pytestmark = pytest.mark.anyio


async def test_a_peer_has_as_many_connections_as_the_limit_and_takes_none_of_others() -> None:
    channels = Channels()
    with contextlib.ExitStack() as held:
        for _ in range(MAX_CHANNELS_PER_PEER - 1):
            held.enter_context(channels.held(EVA, "", "1"))
        assert channels.refusal(EVA) is None
        held.enter_context(channels.held(EVA, "", "1"))
        assert f"has {MAX_CHANNELS_PER_PEER} connections" in str(channels.refusal(EVA))
        assert channels.refusal(BOB) is None
    assert channels.refusal(EVA) is None


async def test_only_the_connections_of_a_revoked_certificate_are_cut() -> None:
    channels = Channels()
    ended: list[str] = []

    async def serve(
        serial: str, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        with channels.held(EVA, "", serial):
            task_status.started()
            await anyio.sleep_forever()
        ended.append(serial)

    async with anyio.create_task_group() as tasks:
        for serial in ("1", "2", "1"):
            await tasks.start(serve, serial)
        assert [channel.serial for channel in channels.cut(frozenset({"1", "7"}))] == ["1", "1"]
        await anyio.wait_all_tasks_blocked()
        assert ended == ["1", "1"]
        tasks.cancel_scope.cancel()
