"""Bytes that nobody should send, on every port of a live agent: it lives, answers, and does not grow."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.abc
import pytest
from anyio.to_thread import run_sync

from agents.api import CONTROL_SCHEMA, GetHost, HostView, ListGuests, Watch
from agents.host.outgoing import MIGRATION_SCHEMA
from agents.hypervisors.embedded.driver import EmbeddedHypervisor, EmbeddedIncomingGuest
from agents.storage import SharedDirs
from memory.codec import MAX_PAYLOAD_BYTES
from migrate.facts import GuestFacts
from migrate.messages import PROTOCOL, Abort, Aborted, Ping, Pong, Prepare, Prepared
from migrate.ownership import Ownership
from tests.agents.host.conftest import AgentLog
from tests.agents.host.fleet import Fleet, running_fleet
from tests.agents.host.processes import Processes, running_processes
from tests.waiting import delay, until
from transport.bundle import SendBundle
from transport.credit import Backoff
from transport.dial import connect
from transport.errors import PeerGone, PeerRefused, TransportError
from transport.hello import CHALLENGE_BYTES, HELLO_BYTES, say_hello
from transport.limits import MAX_MESSAGE_BYTES
from transport.seal import Keys
from transport.session import SESSION_SCHEMA, Attach, Call, CallSession
from transport.tls import Identity, Role, client_context
from transport.wire import MessageChannel

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

LIMITS = 'outage = "500ms"\ndead_peer = "1s"'
BLOBS = 40
# Caches of allocators, and threads' stacks, once they were used.
GROWTH_BYTES = 8 << 20
HOST_A = Identity(role=Role.AGENT, name="host-a")


def blobs(seed: int) -> Iterator[bytes]:
    """Noise, text, almost-right beginnings."""
    rng = random.Random(seed)
    starts = (
        b"",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\n",
        b"VF\x01\x01\x00\x00",
        b"VMFD\x01\x00",
        b"\xf1\x01",
    )
    for _ in range(BLOBS):
        yield rng.choice(starts) + rng.randbytes(rng.choice((0, 1, 3, 72, 1000, 20_000)))


def resident_bytes(processes: Processes, host: str) -> int:
    pages = Path(f"/proc/{processes.running[host].pid}/statm").read_text().split()[1]
    return int(pages) * 4096


def throw(port: int, blob: bytes) -> None:
    """Send and hang up, after what comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock, contextlib.suppress(OSError):
        sock.sendall(blob)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


def context_of(fleet: Fleet, stem: str) -> ssl.SSLContext:
    folder = fleet.folder / "pki"
    return client_context(folder / f"{stem}.crt", folder / f"{stem}.key", folder / "ca.crt")


async def dial(fleet: Fleet, stem: str) -> anyio.abc.ByteStream:
    port = fleet.control_ports["host-a"]
    return await connect("127.0.0.1", port, context_of(fleet, stem), expect=HOST_A, timeout_s=5)


async def throw_trusted(fleet: Fleet, stem: str, blob: bytes) -> None:
    """The same by somebody with a good certificate."""
    stream = await dial(fleet, stem)
    with contextlib.suppress(anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
        await stream.send(blob)
        with anyio.move_on_after(0.02):
            while True:
                await stream.receive()
    await anyio.aclose_forcefully(stream)


async def test_garbage_on_every_port_ends_no_agent_and_fills_no_memory(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet

        async def assault(seed: int) -> None:
            for blob in blobs(seed):
                for port in (fleet.control_ports, fleet.data_ports, fleet.metrics_ports):
                    await run_sync(throw, port["host-a"], blob)
            rng = random.Random(seed)
            for stem in ("operator-tester", "agent-host-b"):
                for frame in (
                    *(
                        struct.pack("!I", len(noise)) + noise
                        for noise in (rng.randbytes(n) for n in (1, 50, 5000))
                    ),
                    struct.pack("!I", 0),
                    struct.pack("!I", MAX_MESSAGE_BYTES + 1) + bytes(100),
                    struct.pack("!I", 0xFFFFFFFF),
                    struct.pack("!I", MAX_MESSAGE_BYTES) + rng.randbytes(100_000),
                    struct.pack("!I", 4) + b"\xdd\xff\xff\xff",
                    struct.pack("!I", 100_000) + b"\x91" * 100_000,
                    rng.randbytes(3),
                ):
                    await throw_trusted(fleet, stem, frame)

        # Some who say nothing and stay: fewer than may, so that others are still heard.
        with contextlib.ExitStack() as loris:
            for number in range(20):
                for ports in (fleet.control_ports, fleet.data_ports, fleet.metrics_ports):
                    silent = socket.create_connection(("127.0.0.1", ports["host-a"]))
                    loris.enter_context(silent)
                    silent.sendall(bytes(number % 2))
            await assault(0)
            before = resident_bytes(processes, "host-a")
            await assault(1)
            await assault(2)
            grown = resident_bytes(processes, "host-a") - before
            assert isinstance(await fleet.ask("host-a", GetHost()), HostView)
        assert grown < GROWTH_BYTES, f"{grown >> 20} MiB"
        status, body = await fleet.page("host-a", "/healthz")
        assert (status, body) == (200, "ok\n")
        lines = processes.lines("host-a")
        assert not [line for line in lines if line["level"] == "error"]
        # Each connection is said once, in one line.
        said = [line for line in lines if line["event"] in ("connection refused", "data connection ended")]
        assert len(said) <= 2 * 3 * BLOBS + 2 * 20 + 10
        assert any(line["event"] == "peer misbehaved" for line in lines)


async def test_who_holds_all_handshakes_holds_them_for_seconds_only(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes, contextlib.ExitStack() as loris:
        fleet = processes.fleet
        for ports in (fleet.control_ports, fleet.data_ports):
            for _ in range(80):
                loris.enter_context(socket.create_connection(("127.0.0.1", ports["host-a"])))

        async def answers() -> bool:
            with contextlib.suppress(TransportError):
                return isinstance(await fleet.ask("host-a", GetHost()), HostView)
            return False

        await until(answers, "an answer of the agent")


def half_a_hello(port: int, tag: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock, contextlib.suppress(OSError):
        sock.recv(CHALLENGE_BYTES, socket.MSG_WAITALL)
        hello = struct.pack("!4sBxH16s16s", b"VMFD", 1, 0, bytes(16), bytes(16)) + tag
        sock.sendall(hello[:HELLO_BYTES])
        sock.shutdown(socket.SHUT_WR)
        if sock.recv(100):
            raise AssertionError("a wrong tag was answered")


async def receive_to_the_end(channel: MessageChannel) -> None:
    while True:
        await channel.receive()


async def test_requests_in_the_wrong_place_are_refused_and_others_go_on(
    folder: Path, agent_log: AgentLog
) -> None:
    async with running_fleet(folder) as fleet:
        for tag in (b"", bytes(10), bytes(32)):
            await run_sync(half_a_hello, fleet.data_ports["host-a"], tag)
        call = Call(seq=1, body=MIGRATION_SCHEMA.encode(Ping()))
        for stem, messages in (
            ("operator-tester", [Attach(session_id=bytes(16), is_new=True)]),
            ("operator-tester", [call]),
            ("agent-host-b", [GetHost()]),
            ("agent-host-b", [call]),
            ("agent-host-b", [Attach(session_id=bytes(16), is_new=True), Watch(job="x")]),
            ("agent-host-b", [Attach(session_id=bytes(16), is_new=True), Call(seq=1, body=b"\xc1")]),
            ("agent-host-b", [Attach(session_id=bytes(16), is_new=True), Call(seq=0, body=call.body)]),
        ):
            agent_log.lines.clear()
            channel = MessageChannel(await dial(fleet, stem), CONTROL_SCHEMA)
            for message in messages:
                await channel.send(message)
            with pytest.raises(PeerGone):
                await receive_to_the_end(channel)
            await channel.aclose()
            assert await agent_log.until("peer misbehaved") == 1
        assert isinstance(await fleet.ask("host-a", ListGuests()), object)
        assert agent_log.count("failed inside") == 0


@contextlib.asynccontextmanager
async def hostile_session(fleet: Fleet) -> AsyncIterator[tuple[CallSession, bytes]]:
    """A session with host-a by somebody who has the certificate of host-b."""
    session_id = uuid.uuid4().bytes

    async def dial_control() -> MessageChannel:
        return MessageChannel(await dial(fleet, "agent-host-b"), SESSION_SCHEMA)

    session = CallSession(
        dial_control, MIGRATION_SCHEMA, session_id, outage_s=1, backoff=Backoff(0.05, 0.1, random.Random(1))
    )
    try:
        yield session, session_id
    finally:
        await session.aclose()


async def preparation(fleet: Fleet, guest_id: str = "", **changed: object) -> Prepare:
    """What host-b would ask of host-a to bring its guest there: this one, or the only one that it has."""
    hypervisor = EmbeddedHypervisor(fleet.guests_dir("host-b"), "host-b")
    (facts,) = [facts for facts in await hypervisor.guests() if guest_id in ("", facts.guest_id)]
    storage = SharedDirs([fleet.shared])
    directory = await storage.ownership_dir(facts)
    first = Ownership(guest_id=facts.guest_id, generation=1, owner="host-b", migration_id="m")
    await storage.claim(directory, first)
    honest = Prepare(
        protocol=PROTOCOL,
        guest=facts,
        source_host="host-b",
        generation=1,
        ownership_dir=directory,
        secret=bytes(32),
        digest_key=bytes(16),
        connections=1,
        window_bytes=4 << 20,
        resumes="",
    )
    return replace(honest, **changed)  # type: ignore[arg-type]


async def test_preparations_that_lie_are_refused_in_words_and_leave_nothing(folder: Path) -> None:
    async with running_fleet(folder) as fleet:
        fleet.start_guest("host-b")
        good = await preparation(fleet)
        for lie in (
            {"protocol": PROTOCOL + 1},
            {"protocol": -1},
            {"source_host": "host-c"},
            {"generation": 2},
            {"generation": 0},
            {"ownership_dir": "/etc"},
            {"ownership_dir": f"{fleet.shared}/../.vmferry"},
            {"ownership_dir": "\0"},
            {"secret": b""},
            {"digest_key": bytes(17)},
            {"window_bytes": -1, "generation": 3},
        ):
            async with hostile_session(fleet) as (session, _):
                with pytest.raises(PeerRefused) as refused:
                    await session.call(await preparation(fleet, **lie), timeout_s=5)
                assert "failed inside" not in refused.value.text, lie
                assert fleet.machines("host-a") == [], lie
        # Nothing of that is in the way of an honest one.
        async with hostile_session(fleet) as (session, _):
            assert isinstance(await session.call(good, timeout_s=5), Prepared)
            assert isinstance(await session.call(Abort(reason="enough"), timeout_s=5), Aborted)
        assert fleet.machines("host-a") == []


@pytest.mark.slow
async def test_a_machine_that_takes_long_to_make_is_no_silence_of_its_source(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = EmbeddedHypervisor.prepare_incoming

    async def take_long(hypervisor: EmbeddedHypervisor, facts: GuestFacts) -> EmbeddedIncomingGuest:
        await delay(4.0)
        return await prepare(hypervisor, facts)

    monkeypatch.setattr(EmbeddedHypervisor, "prepare_incoming", take_long)
    async with running_fleet(folder, LIMITS) as fleet:
        fleet.start_guest("host-b")
        async with hostile_session(fleet) as (session, _):
            assert isinstance(await session.call(await preparation(fleet), timeout_s=20), Prepared)
            await delay(0.2)  # of its source, which is no silence either
            assert len(fleet.machines("host-a")) == 1
            assert isinstance(await session.call(Abort(reason="enough"), timeout_s=5), Aborted)


def noise_after_hello(port: int, session_id: bytes, keys: Keys, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        say_hello(sock, session_id, 0, keys.hello)
        sock.settimeout(5)
        with contextlib.suppress(OSError):
            sock.sendall(noise)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass


def hostile_bundle(port: int, session_id: bytes, keys: Keys) -> SendBundle:
    """One data connection of a session, sealed as it should be; what goes over it is the caller's."""

    async def dial_data(slot: int) -> socket.socket:
        def dial_blocking() -> socket.socket:
            sock = socket.create_connection(("127.0.0.1", port), timeout=5)
            say_hello(sock, session_id, slot, keys.hello)
            return sock

        return await run_sync(dial_blocking)

    return SendBundle(
        dial_data,
        keys=keys,
        connections=1,
        max_payload_bytes=MAX_PAYLOAD_BYTES,
        outage_s=0.1,
        dead_peer_s=1,
    )


def payload_of(noise: bytes) -> Callable[[memoryview], int]:
    """A producer that gives this payload once."""
    left = [noise]

    def produce(buffer: memoryview) -> int:
        if not left:
            return 0
        payload = left.pop()
        buffer[: len(payload)] = payload
        return len(payload)

    return produce


@pytest.mark.parametrize("size", [1, 40, 5000, MAX_PAYLOAD_BYTES])
async def test_noise_after_a_good_hello_and_under_a_good_seal_ends_that_migration_only(
    folder: Path, agent_log: AgentLog, size: int
) -> None:
    async with running_fleet(folder, LIMITS) as fleet:
        fleet.start_guest("host-b")
        rng = random.Random(size)
        async with hostile_session(fleet) as (session, session_id):
            prepared = await session.call(await preparation(fleet), timeout_s=5)
            assert isinstance(prepared, Prepared)
            keys = Keys(bytes(32))
            port = prepared.data_port
            noise = rng.randbytes(size)
            await run_sync(noise_after_hello, port, session_id, keys, b"\xf1\x01" + noise)
            # Anybody on the path can do that: the connection is dead, the migration is not.
            pong = await session.call(Ping(), timeout_s=5)
            assert isinstance(pong, Pong)
            assert pong.failure is None

            bundle = hostile_bundle(port, session_id, keys)
            with pytest.raises(PeerGone):
                await bundle.send_all(payload_of(noise))
            await bundle.aclose()
            pong = await session.call(Ping(), timeout_s=5)
            assert isinstance(pong, Pong)
            assert pong.failure
            await session.call(Abort(reason="enough"), timeout_s=5)
        assert fleet.machines("host-a") == []
        assert isinstance(await fleet.ask("host-a", GetHost()), HostView)
        assert agent_log.count("failed inside") == 0
