"""A fleet of scripted agents in memory: what the client is tested against."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import anyio.lowlevel

from agents.api import CONTROL_SCHEMA, GuestList, HostView, JobView
from agents.client import Fleet
from agents.config import ClientSettings, Endpoint, TlsSettings
from agents.connection import AgentClient
from migrate.facts import BlockFacts, CpuFacts, GuestFacts
from migrate.phases import Phase
from migrate.stats import DowntimeParts, PageCounts, Progress, Report, RoundStats
from tests.faults import Fuse, fused_stream_pair
from transport.errors import PeerGone
from transport.wire import MessageChannel

# Serves one connection: receives requests, sends answers. The connection closes when it returns.
Script = Callable[[MessageChannel], Awaitable[None]]

TLS = TlsSettings(ca=Path("ca.crt"), certificate=Path("own.crt"), key=Path("own.key"))


def settings_of(*hosts: str) -> ClientSettings:
    return ClientSettings(tls=TLS, hosts={host: Endpoint(host, 7700) for host in hosts})


def answering(*answers: object, received: list[object] | None = None) -> Script:
    """Answer each request with the next of `answers`; a tuple is several messages. Then hang up."""

    async def script(channel: MessageChannel) -> None:
        for answer in answers:
            request = await channel.receive()
            if received is not None:
                received.append(request)
            for message in answer if isinstance(answer, tuple) else (answer,):
                await channel.send(message)

    return script


async def silent(channel: MessageChannel) -> None:
    """Take requests and never answer."""
    while True:
        await channel.receive()


class ScriptedHosts:
    """Connects to scripts: each connection to a host takes its next script; the last one is for all that follow.

    A host without scripts cannot be reached. Connections are counted in `dials`. Use as `async with`; leaving
    ends the scripts.
    """

    def __init__(self, scripts: dict[str, list[Script]], *, timeout_s: float = 5.0) -> None:
        self.scripts = scripts
        self.dials: list[str] = []
        self._timeout_s = timeout_s
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        self._tasks.cancel_scope.cancel()
        return await self._tasks.__aexit__(exc_type, exc, traceback)

    @asynccontextmanager
    async def connect(self, host: str) -> AsyncIterator[AgentClient]:
        self.dials.append(host)
        await anyio.lowlevel.checkpoint()
        scripts = self.scripts.get(host, [])
        if not scripts:
            raise PeerGone(f"the agent of {host}: cannot be reached", may_have_reached_peer=False)
        script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        ours, theirs = fused_stream_pair(Fuse())
        self._tasks.start_soon(_serve, script, MessageChannel(theirs, CONTROL_SCHEMA))
        channel = MessageChannel(ours, CONTROL_SCHEMA)
        async with AgentClient(
            host, channel, timeout_s=self._timeout_s, far_timeout_s=self._timeout_s
        ) as agent:
            yield agent

    def fleet(
        self,
        *,
        outage_s: float = 5.0,
        cancel_wait_s: float = 5.0,
        watch_silence_s: float = 5.0,
    ) -> Fleet:
        return Fleet(
            settings_of(*self.scripts),
            connect=self.connect,
            outage_s=outage_s,
            cancel_wait_s=cancel_wait_s,
            watch_silence_s=watch_silence_s,
            redial_first_s=0.001,
        )


async def _serve(script: Script, channel: MessageChannel) -> None:
    try:
        await script(channel)
    except PeerGone:
        pass
    finally:
        await channel.aclose()


def guest_facts(name: str = "vm1", guest_id: str = "id-of-vm1", *, is_running: bool = True) -> GuestFacts:
    return GuestFacts(
        guest_id=guest_id,
        name=name,
        hypervisor="embedded",
        is_running=is_running,
        machine="embedded-1",
        blocks=(BlockFacts(name="ram", size_bytes=64 << 20),),
        cpu=CpuFacts(model="qemu64", features=("sse2",)),
        disks=(),
        spec=b"",
    )


def guest_list(host: str, *guests: GuestFacts) -> GuestList:
    return GuestList(host=host, guests=guests)


def host_view(name: str, *, peers: tuple[str, ...] = ("host-b",)) -> HostView:
    return HostView(
        name=name,
        version="0.1.0",
        is_draining=False,
        hypervisors=("embedded",),
        free_memory_bytes=8 << 30,
        guests=1,
        outgoing=0,
        outgoing_limit=4,
        incoming=1,
        incoming_limit=4,
        peers=peers,
    )


ROUNDS = (
    RoundStats(
        number=0,
        duration_s=0.8,
        sent_pages=16384,
        wire_bytes=20 << 20,
        dirty_pages=512,
        dirty_rate_pages_per_s=640.0,
        goodput_bytes_per_s=80e6,
        predicted_downtime_s=0.031,
        because="a round of 26 ms would leave about 17 of 512 dirty pages",
    ),
    RoundStats(
        number=1,
        duration_s=0.03,
        sent_pages=512,
        wire_bytes=1 << 20,
        dirty_pages=20,
        dirty_rate_pages_per_s=660.0,
        goodput_bytes_per_s=70e6,
        predicted_downtime_s=0.006,
        because="20 dirty pages are copied in 1.2 ms",
    ),
)


def report(phase: Phase = Phase.COMPLETE, error: str | None = None) -> Report:
    """The report of a move of vm1 from host-a to host-b."""
    is_complete = phase is Phase.COMPLETE
    return Report(
        phase=phase,
        guest_id="id-of-vm1",
        guest_name="vm1",
        source="host-a",
        destination="host-b",
        runs_on={Phase.COMPLETE: "host-b", Phase.ROLLED_BACK: "host-a"}.get(phase),
        error=error,
        total_s=1.25,
        downtime=DowntimeParts(
            pause_s=0.0005, last_pages_s=0.0012, device_state_s=0.002, load_s=0.001, resume_s=0.0007
        )
        if is_complete
        else None,
        rounds=ROUNDS,
        counts=PageCounts(
            zero_pages=8192,
            raw_pages=100,
            zstd_pages=8624,
            delta_pages=500,
            raw_bytes=409_600,
            zstd_bytes=20 << 20,
            delta_bytes=20_480,
        ),
        ram_bytes=64 << 20,
        wire_bytes=21 << 20,
        resent_bytes=0,
        link_breaks=0,
        tracking="userfaultfd",
        audit_s=0.21 if is_complete else None,
        source_digest=bytes(range(16)) if is_complete else None,
        destination_digest=bytes(range(16)) if is_complete else None,
    )


def view(
    phase: Phase = Phase.PRECOPY,
    *,
    job: str = "a1b2c3d4e5f6",
    is_outgoing: bool = True,
    has_ended: bool = False,
    rounds: tuple[RoundStats, ...] = ROUNDS[:1],
    error: str | None = None,
) -> JobView:
    """A view of the job that moves vm1 from host-a to host-b; an outgoing one that has ended has its report."""
    return JobView(
        job=job,
        is_outgoing=is_outgoing,
        guest_id="id-of-vm1",
        guest_name="vm1",
        source="host-a",
        destination="host-b",
        phase=phase,
        has_ended=has_ended,
        is_paused=False,
        started_at_s=1_700_000_000.0,
        because=error or "the first page was sent",
        progress=Progress(
            phase=phase,
            round_number=1,
            dirty_pages=512,
            remaining_pages=300,
            wire_bytes=20 << 20,
            wire_rate_bytes_per_s=118e6,
            dirty_rate_pages_per_s=640.0,
            predicted_downtime_s=0.031,
        ),
        rounds=rounds,
        report=report(phase, error) if has_ended and is_outgoing else None,
    )
