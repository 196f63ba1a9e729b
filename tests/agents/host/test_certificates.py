"""Peers that are not who they must be: refused at both ends, in plain words, and the agent lives."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from agents.api import CONTROL_SCHEMA, GetHost, HostView
from tests.agents.host.conftest import AgentLog
from tests.agents.host.fleet import Fleet, running_fleet
from tests.transport.certificates import Authority, Files
from transport.dial import connect
from transport.errors import PeerGone, UntrustedPeer
from transport.session import Attach
from transport.tls import Identity, Role, client_context
from transport.wire import MessageChannel

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

HOST_A = Identity(role=Role.AGENT, name="host-a")


async def dial(fleet: Fleet, files: Files, expect: Identity = HOST_A) -> MessageChannel:
    context = client_context(files.certificate, files.key, files.ca)
    stream = await connect("127.0.0.1", fleet.control_ports["host-a"], context, expect=expect, timeout_s=5)
    return MessageChannel(stream, CONTROL_SCHEMA)


async def check_lives(fleet: Fleet) -> None:
    assert isinstance(await fleet.ask("host-a", GetHost()), HostView)


async def test_strangers_are_refused_in_words_at_both_ends(folder: Path, agent_log: AgentLog) -> None:
    async with running_fleet(folder) as fleet:
        issued = folder / "strange"
        issued.mkdir()
        stranger = Authority(issued, "stranger")
        ours = folder / "pki" / "ca.crt"
        wrong_ca = stranger.issue("vmferry://operator/eve", trusts=ours)
        with pytest.raises(UntrustedPeer, match="another CA"):
            await dial(fleet, wrong_ca)
        assert await agent_log.until("was issued by another CA") == 1
        await check_lives(fleet)


async def test_bad_certificates_of_our_own_ca_are_refused_in_words_at_both_ends(
    folder: Path, agent_log: AgentLog
) -> None:
    issued = folder / "own"
    issued.mkdir()
    authority = Authority(issued, "fleet")
    async with running_fleet(folder, authority=authority) as fleet:
        for uris, days, ours, theirs in (
            (("vmferry://operator/old",), -1, "has expired", "it has expired"),
            (("vmferry://janitor/jo",), 1, "unknown role", "unknown role"),
            ((), 1, "no vmferry:// URI", "no vmferry:// URI"),
            (("vmferry://agent/x", "vmferry://agent/y"), 1, "2 identities", "2 identities"),
        ):
            agent_log.lines.clear()
            with pytest.raises(UntrustedPeer, match=theirs):
                await dial(fleet, authority.issue(*uris, valid_for=timedelta(days=days)))
            assert await agent_log.until(ours) == 1, uris
        with pytest.raises(UntrustedPeer, match="expected agent/host-b, got agent/host-a"):
            await dial(
                fleet, authority.issue("vmferry://operator/o"), Identity(role=Role.AGENT, name="host-b")
            )
        assert await agent_log.until("expected agent/host-b, got agent/host-a") == 1
        await check_lives(fleet)


async def test_each_role_speaks_its_own_language_only(folder: Path, agent_log: AgentLog) -> None:
    async with running_fleet(folder) as fleet:
        certificates = folder / "pki"
        for name, message in (
            ("operator-tester", Attach(session_id=bytes(16), is_new=True)),
            ("agent-host-b", GetHost()),
        ):
            files = Files(
                certificate=certificates / f"{name}.crt",
                key=certificates / f"{name}.key",
                ca=certificates / "ca.crt",
            )
            agent_log.lines.clear()
            channel = await dial(fleet, files)
            await channel.send(message)
            with pytest.raises(PeerGone):
                await channel.receive()
            await channel.aclose()
            assert await agent_log.until("peer misbehaved") == 1
        await check_lives(fleet)
