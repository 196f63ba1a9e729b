"""Whole command lines against agents in memory that answer by a function."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from agents.api import CONTROL_SCHEMA
from agents.cli import options
from agents.client import Fleet
from agents.connection import AgentClient
from tests.agents.scripted_agent import settings_of
from transport.errors import PeerGone
from transport.wire import MessageChannel

# Gives the answers to one request; no answer: the agent hangs up.
Respond = Callable[[object], Sequence[object]]


class RespondingStream(anyio.abc.ByteStream):
    """A connection whose other end is a function: no task that would outlive the command's event loop."""

    def __init__(self, respond: Respond) -> None:
        self._respond = respond
        self._asked = bytearray()
        self._answers = bytearray()

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        self._asked += item
        if len(self._asked) < 4 or len(self._asked) < 4 + struct.unpack_from("!I", self._asked)[0]:
            return
        request = CONTROL_SCHEMA.decode(bytes(self._asked[4:]))
        self._asked.clear()
        for answer in self._respond(request):
            body = CONTROL_SCHEMA.encode(answer)
            self._answers += struct.pack("!I", len(body)) + body

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if not self._answers:
            raise anyio.EndOfStream
        data = bytes(self._answers[:max_bytes])
        del self._answers[:max_bytes]
        return data

    async def send_eof(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()


@dataclass(slots=True)
class Agents:
    """The agents that commands reach in a test; None cannot be reached. `asked` are (host, request).

    An agent hangs up after each answer; for `outage_s` a watch dials it again.
    """

    hosts: dict[str, Respond | None] = field(default_factory=dict)
    asked: list[tuple[str, object]] = field(default_factory=list)
    outage_s: float = 0.0

    def requests(self, kind: type) -> list[object]:
        return [request for _, request in self.asked if isinstance(request, kind)]

    @asynccontextmanager
    async def connect(self, host: str) -> AsyncIterator[AgentClient]:
        await anyio.lowlevel.checkpoint()
        respond = self.hosts[host]
        if respond is None:
            raise PeerGone(f"the agent of {host}: cannot be reached", may_have_reached_peer=False)

        def noted(request: object) -> Sequence[object]:
            self.asked.append((host, request))
            return respond(request)

        async with AgentClient(host, MessageChannel(RespondingStream(noted), CONTROL_SCHEMA)) as agent:
            yield agent


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    """Let every command of this test talk to these agents; a test adds the hosts."""
    made = Agents()
    monkeypatch.setattr(
        options,
        "open_fleet",
        lambda config: Fleet(
            settings_of(*made.hosts), connect=made.connect, outage_s=made.outage_s, redial_first_s=0.001
        ),
    )
    return made
