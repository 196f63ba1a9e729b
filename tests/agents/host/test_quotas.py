"""What one peer may take of a live agent, and that the others still get theirs."""

from __future__ import annotations

import uuid
from pathlib import Path

import anyio
import pytest

from agents.api import GetHost, HostView
from agents.host.pace import BURST_CALLS, CALLS_PER_S
from tests.agents.host.fleet import Fleet, running_fleet
from transport.dial import connect
from transport.limits import MAX_SESSIONS_PER_OWNER
from transport.session import SESSION_SCHEMA, Attach, Attached, Refusal
from transport.tls import Identity, Role, client_context
from transport.wire import MessageChannel

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def attach(fleet: Fleet, name: str) -> object:
    """Attach to host-b as an agent, and hang up without a call; the answer."""
    folder = fleet.folder / "pki"
    context = client_context(folder / f"agent-{name}.crt", folder / f"agent-{name}.key", folder / "ca.crt")
    stream = await connect(
        "127.0.0.1",
        fleet.control_ports["host-b"],
        context,
        expect=Identity(role=Role.AGENT, name="host-b"),
        timeout_s=5,
    )
    channel = MessageChannel(stream, SESSION_SCHEMA)
    try:
        await channel.send(Attach(session_id=uuid.uuid4().bytes, is_new=True))
        return await channel.receive()
    finally:
        await channel.aclose()


async def test_sessions_that_nobody_calls_in_shut_out_their_own_peer_only_and_for_a_while(
    folder: Path,
) -> None:
    # The second of these is how long nothing may be heard of a source, together with the first.
    async with running_fleet(folder, limits='outage = "3s"\ndead_peer = "1s"') as fleet:
        for _ in range(MAX_SESSIONS_PER_OWNER):
            assert isinstance(await attach(fleet, "host-a"), Attached)
        assert isinstance(await attach(fleet, "host-a"), Refusal)
        assert isinstance(await attach(fleet, "host-b"), Attached)
        with anyio.fail_after(20):
            while not isinstance(await attach(fleet, "host-a"), Attached):
                pass


async def test_an_operator_who_asks_without_end_is_slowed_down_and_refused_nothing(folder: Path) -> None:
    late = CALLS_PER_S // 2
    async with running_fleet(folder) as fleet, fleet.operator("host-a") as channel:
        began_s = anyio.current_time()
        for _ in range(BURST_CALLS + late):
            await channel.send(GetHost())
            assert isinstance(await channel.receive(), HostView)
        assert anyio.current_time() - began_s >= late / CALLS_PER_S
