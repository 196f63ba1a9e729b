"""A peer with a good certificate takes all that it may: it is bounded, it comes back, and others are served."""

from __future__ import annotations

import contextlib
import socket
import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import anyio.abc
import msgpack
import numpy as np
import pytest
from anyio.to_thread import run_sync

from agents.hypervisors.embedded.spec import EmbeddedSpec
from memory.codec import MAX_PAYLOAD_BYTES, BatchEncoder
from memory.runs import runs_of_gfns
from migrate.messages import Abort, Ping, Pong, Prepared
from migrate.phases import Phase
from tests.agents.host.fleet import Fleet, report_of
from tests.agents.host.processes import Processes, running_processes
from tests.agents.host.test_garbage import dial, hostile_session, preparation
from tests.agents.host.test_malicious import Ones
from tests.waiting import until
from transport.errors import PeerRefused, TransportError
from transport.frames import HEADER_BYTES, TAG_BYTES, Header, Kind, pack_header
from transport.hello import say_hello
from transport.limits import MAX_CONNECTIONS, MAX_RECORD_BYTES, MAX_REQUEST_BYTES
from transport.seal import Keys, Sealer
from transport.session import SESSION_SCHEMA, Attach, Attached, CallSession
from transport.wire import MessageChannel

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt,
]

LIMITS = 'outage = "5s"\ndead_peer = "5s"\nincoming = 3\n'
SESSIONS = 2
CHANNELS = 24
TOO_MANY = 32
# Its control connection, the machine's, that one's RAM twice and its process, and the journal.
FILES_OF_SESSION = 6
SECRET = Keys(bytes(32))
# Caches of allocators, threads' stacks, and one garbage collection that is still to come.
SLACK_BYTES = 24 << 20
# Two threads' worth of pools that grow by themselves.
SLACK_THREADS = 8
SLACK_FILES = 8
STEADY_LOOKS = 5
# Unused threads of a pool end after 10 s.
RETURNS_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What an agent's process has."""

    resident_bytes: int
    files: int
    threads: int


def held(processes: Processes) -> Held:
    proc = Path(f"/proc/{processes.running['host-a'].pid}")
    return Held(
        resident_bytes=int((proc / "statm").read_text().split()[1]) * 4096,
        files=len(list((proc / "fd").iterdir())),
        threads=len(list((proc / "task").iterdir())),
    )


async def settled(processes: Processes) -> Held:
    """Wait until an agent has taken what it was sent: until it holds the same for some looks in a row."""
    last = [held(processes)]

    def same() -> bool:
        last.append(held(processes))
        return len(last) >= STEADY_LOOKS and len(set(last[-STEADY_LOOKS:])) == 1

    await until(same, "an agent that holds the same for a while", within_s=RETURNS_WITHIN_S, every_s=0.1)
    return last[-1]


async def check_returns(processes: Processes, before: Held) -> None:
    """Insist that an agent lets go of everything."""

    def has_returned() -> bool:
        now = held(processes)
        return (
            now.resident_bytes <= before.resident_bytes + SLACK_BYTES
            and now.files <= before.files + SLACK_FILES
            and now.threads <= before.threads + SLACK_THREADS
        )

    await until(
        has_returned,
        lambda: f"what it held before: {before}, now {held(processes)}",
        within_s=RETURNS_WITHIN_S,
        every_s=0.2,
    )


async def check_moves(fleet: Fleet, guest: EmbeddedSpec) -> None:
    """Insist that a guest of a peer that behaves comes here."""
    report = report_of(await fleet.move(guest.guest_id, "host-b", "host-a"))
    assert report.phase is Phase.COMPLETE, report.error
    assert report.source_digest == report.destination_digest
    await fleet.check_runs_only_at("host-a", guest.guest_id)


@asynccontextmanager
async def prepared_session(
    fleet: Fleet, guest: EmbeddedSpec, **lies: object
) -> AsyncIterator[tuple[CallSession, bytes, int]]:
    """A session of a hostile host-b, whose machine waits at host-a; with it and the data port."""
    async with hostile_session(fleet) as (session, session_id):
        prepared = await session.call(await preparation(fleet, guest.guest_id, **lies), timeout_s=10)
        assert isinstance(prepared, Prepared)
        yield session, session_id, prepared.data_port


def hold_connection(port: int, session_id: bytes, slot: int) -> socket.socket | None:
    """Open a data connection that has sent the most of a record that it may without sending all; None: refused."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    try:
        say_hello(sock, session_id, slot, SECRET.hello)
        sock.settimeout(5)
        sock.sendall(
            pack_header(Header(kind=Kind.DATA, slot=slot, payload_bytes=MAX_PAYLOAD_BYTES, seq=slot))
        )
        sock.sendall(bytes(MAX_PAYLOAD_BYTES))
    except (OSError, TransportError):
        sock.close()
        return None
    return sock


async def test_sessions_with_all_connections_and_windows_hold_what_the_limits_say(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guests = [fleet.start_guest("host-b", name=f"guest-{number}") for number in range(SESSIONS + 2)]
        await check_moves(fleet, guests[0])
        before = held(processes)
        with ExitStack() as sockets:
            async with AsyncExitStack() as stack:
                for guest in guests[1 : SESSIONS + 1]:
                    _, session_id, port = await stack.enter_async_context(
                        prepared_session(fleet, guest, window_bytes=1 << 62, connections=1 << 30)
                    )
                    for number in range(MAX_CONNECTIONS + TOO_MANY):
                        sock = await run_sync(hold_connection, port, session_id, number % MAX_CONNECTIONS)
                        if sock is not None:
                            sockets.enter_context(sock)
                during = await settled(processes)
                of_connections = SESSIONS * MAX_CONNECTIONS
                assert (
                    during.resident_bytes - before.resident_bytes
                    < of_connections * 2 * MAX_RECORD_BYTES + SLACK_BYTES
                )
                # It did take them: otherwise this measures nothing.
                assert during.resident_bytes - before.resident_bytes > of_connections * MAX_RECORD_BYTES
                assert during.threads - before.threads <= of_connections + SLACK_THREADS
                assert (
                    during.files - before.files <= of_connections + SESSIONS * FILES_OF_SESSION + SLACK_FILES
                )
                # The third place is for others, and they are served meanwhile.
                await check_moves(fleet, guests[-1])
            # It hangs up in the control sessions, and says no Abort; the silent connections stay.
            await check_returns(processes, before)


@pytest.mark.parametrize("ram_bytes", [60 << 30, 1 << 50, (1 << 63) - 4096])
async def test_a_guest_larger_than_the_host_is_refused_and_costs_nothing(
    folder: Path, anyio_backend_name: str, ram_bytes: int
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-b")
        before = held(processes)
        good = await preparation(fleet)
        # As bytes: our own description says no before it is sent.
        spec = msgpack.packb({**msgpack.unpackb(good.guest.spec), "ram_bytes": ram_bytes})
        (block,) = good.guest.blocks
        blocks = (replace(block, size_bytes=ram_bytes),)
        lie = replace(good, guest=replace(good.guest, blocks=blocks, spec=spec))
        async with hostile_session(fleet) as (session, _):
            with pytest.raises(PeerRefused) as refused:
                await session.call(lie, timeout_s=5)
            assert "failed inside" not in refused.value.text
        assert fleet.machines("host-a") == []
        await check_returns(processes, before)
        await check_moves(fleet, guest)


async def test_requests_that_are_begun_and_never_ended_hold_one_mebibyte_each(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guest = fleet.start_guest("host-b")
        before = held(processes)
        streams: list[anyio.abc.ByteStream] = []
        session_id = uuid.uuid4().bytes

        async def begin(size: int) -> None:
            stream = await dial(fleet, "agent-host-b")
            streams.append(stream)
            channel = MessageChannel(stream, SESSION_SCHEMA)
            await channel.send(Attach(session_id=session_id, is_new=True))
            assert isinstance(await channel.receive(), Attached)
            with contextlib.suppress(anyio.BrokenResourceError):
                await stream.send(struct.pack("!I", size))
                for _ in range((size - 1) // 4096):
                    await stream.send(bytes(4096))

        try:
            for _ in range(CHANNELS):
                await begin(8 * MAX_REQUEST_BYTES)
                await begin(MAX_REQUEST_BYTES)
            during = await settled(processes)
            # A buffer that grows is up to an eighth larger than what is in it; TLS has about 100 KiB a connection.
            each = MAX_REQUEST_BYTES * 9 // 8 + (200 << 10)
            assert during.resident_bytes - before.resident_bytes < CHANNELS * each + SLACK_BYTES
            await check_moves(fleet, guest)
        finally:
            for stream in streams:
                await anyio.aclose_forcefully(stream)
        await check_returns(processes, before)


def send_without_reading(sock: socket.socket) -> int:
    """Send good records until nothing more is taken; give how many. Their acknowledgements are never read."""
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    runs = runs_of_gfns(np.array([7], dtype=np.uint64))
    payload = bytes(out[: BatchEncoder(None).encode_into(Ones(), runs, out, level=None).payload_bytes])
    sealer, record = Sealer(SECRET, Kind.DATA), bytearray(HEADER_BYTES + len(payload) + TAG_BYTES)
    sock.settimeout(2)
    for seq in range(1 << 16):
        header = pack_header(Header(kind=Kind.DATA, slot=0, payload_bytes=len(payload), seq=seq))
        record[:HEADER_BYTES] = header
        with memoryview(record) as view:
            sealer.seal_into(seq, header, payload, view[HEADER_BYTES:])
        try:
            sock.sendall(record)
        except TimeoutError:
            return seq
    raise AssertionError("everything was taken")


async def test_a_peer_that_never_reads_its_acknowledgements_holds_one_thread_until_its_session_ends(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet
        guest, other = fleet.start_guest("host-b"), fleet.start_guest("host-b", name="other")
        before = held(processes)
        with socket.socket() as sock:
            # As little as the kernel takes, so that acknowledgements fill it soon.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            async with prepared_session(fleet, guest) as (session, session_id, port):

                def attack() -> int:
                    sock.connect(("127.0.0.1", port))
                    say_hello(sock, session_id, 0, SECRET.hello)
                    return send_without_reading(sock)

                sent = await run_sync(attack)
                assert sent > 100
                during = held(processes)
                assert during.resident_bytes - before.resident_bytes < 2 * MAX_RECORD_BYTES + SLACK_BYTES
                assert during.threads - before.threads <= 1 + SLACK_THREADS
                pong = await session.call(Ping(), timeout_s=5)
                assert isinstance(pong, Pong)
                await check_moves(fleet, other)
                await session.call(Abort(reason="enough"), timeout_s=10)
            await check_returns(processes, before)
        assert not any(guest.guest_id in name for name in fleet.machines("host-a"))
