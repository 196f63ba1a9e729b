"""A peer with a good certificate and bad intentions: it gets nowhere, and others are served as before."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest
from anyio.to_thread import run_sync

from agents.api import GetHost, HostView
from agents.hypervisors.embedded.spec import EmbeddedSpec
from memory.codec import MAX_PAYLOAD_BYTES, BatchEncoder
from memory.layout import PAGE_BYTES
from memory.runs import Runs, pages_in, runs_of_gfns
from migrate.messages import Abort, Aborted, Ping, Pong, Prepared
from tests.agents.host.conftest import AgentLog
from tests.agents.host.fleet import running_fleet
from tests.agents.host.processes import Processes, running_processes
from tests.agents.host.test_garbage import (
    LIMITS,
    dial,
    half_a_hello,
    hostile_bundle,
    hostile_session,
    payload_of,
    preparation,
)
from tests.waiting import until
from transport.errors import PeerGone, PeerMisbehaved, PeerRefused
from transport.hello import say_hello
from transport.seal import Keys

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

WAVES = 3
PEERS = 20


class Ones:
    """Pages that are no zeros, wherever they are said to be."""

    def gather(self, runs: Runs, out: memoryview) -> int:
        size = pages_in(runs) * PAGE_BYTES
        out[:size] = b"\1" * size
        return size


# The first page behind the guest of 64 MiB, one that a larger one would have, and the last that can be named.
@pytest.mark.parametrize("gfn", [1 << 14, 1 << 20, (1 << 40) - 1])
async def test_pages_beyond_the_granted_guest_are_not_written(
    folder: Path, agent_log: AgentLog, gfn: int
) -> None:
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    runs = runs_of_gfns(np.array([gfn], dtype=np.uint64))
    payload = bytes(out[: BatchEncoder(None).encode_into(Ones(), runs, out, level=None).payload_bytes])
    async with running_fleet(folder, LIMITS) as fleet:
        fleet.start_guest("host-b")
        async with hostile_session(fleet) as (session, session_id):
            prepared = await session.call(await preparation(fleet), timeout_s=5)
            assert isinstance(prepared, Prepared)
            bundle = hostile_bundle(prepared.data_port, session_id, Keys(bytes(32)))
            with pytest.raises(PeerGone):
                await bundle.send_all(payload_of(payload))
            await bundle.aclose()
            pong = await session.call(Ping(), timeout_s=5)
            assert isinstance(pong, Pong)
            assert pong.failure
            await session.call(Abort(reason="enough"), timeout_s=5)
        assert fleet.machines("host-a") == []
        assert isinstance(await fleet.ask("host-a", GetHost()), HostView)
        assert agent_log.count("failed inside") == 0


def held(processes: Processes) -> tuple[int, int]:
    """Files and threads of host-a."""
    proc = Path(f"/proc/{processes.running['host-a'].pid}")
    return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))


async def test_files_and_threads_return_after_half_hellos_and_silent_sessions(
    folder: Path, anyio_backend_name: str
) -> None:
    with running_processes(folder, anyio_backend_name, LIMITS) as processes:
        fleet = processes.fleet

        async def wave() -> None:
            streams = [await dial(fleet, "agent-host-b") for _ in range(PEERS)]
            for _ in range(PEERS):
                await run_sync(half_a_hello, fleet.data_ports["host-a"], bytes(32))
            assert isinstance(await fleet.ask("host-a", GetHost()), HostView)
            for stream in streams:
                await anyio.aclose_forcefully(stream)

        at_first = held(processes)
        # The first fills pools of threads.
        await wave()
        await until(lambda: held(processes)[0] <= at_first[0] + 1, "the files of the first wave")
        files, threads = held(processes)
        for _ in range(WAVES):
            await wave()
        await until(
            lambda: held(processes)[0] <= files and held(processes)[1] <= threads + 2,
            f"{files} files and {threads} threads",
        )
        assert isinstance(await fleet.ask("host-a", GetHost()), HostView)


@pytest.mark.parametrize("is_linked", [False, True])
async def test_a_peers_guest_gets_no_file_outside_the_shared_storage(folder: Path, is_linked: bool) -> None:
    async with running_fleet(folder, LIMITS) as fleet:
        secret = folder / "secret"
        secret.write_bytes(bytes(64 << 10))
        path = secret
        if is_linked:
            path = fleet.shared / "link.img"
            path.symlink_to(secret)
        fleet.start_guest("host-b")
        good = await preparation(fleet)
        spec = replace(EmbeddedSpec.from_bytes(good.guest.spec), disk_path=str(path))
        lie = replace(good, guest=replace(good.guest, spec=spec.to_bytes()))
        async with hostile_session(fleet) as (session, _):
            with pytest.raises(PeerRefused, match="shared_dirs"):
                await session.call(lie, timeout_s=5)
        assert fleet.machines("host-a") == []
        async with hostile_session(fleet) as (session, _):
            assert isinstance(await session.call(good, timeout_s=5), Prepared)
            assert isinstance(await session.call(Abort(reason="enough"), timeout_s=5), Aborted)
        assert fleet.machines("host-a") == []


async def test_a_hello_of_another_session_or_of_one_that_ended_opens_nothing(folder: Path) -> None:
    async with running_fleet(folder, LIMITS) as fleet:
        fleet.start_guest("host-b")

        def knock(port: int, session_id: bytes, key: bytes) -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
                say_hello(sock, session_id, 0, key)

        keys, others = Keys(bytes(32)), Keys(b"\1" * 32)
        async with hostile_session(fleet) as (session, session_id):
            prepared = await session.call(await preparation(fleet), timeout_s=5)
            assert isinstance(prepared, Prepared)
            for name, key in ((session_id, others.hello), (bytes(16), keys.hello)):
                with pytest.raises((PeerGone, PeerMisbehaved)):
                    await run_sync(knock, prepared.data_port, name, key)
            await run_sync(knock, prepared.data_port, session_id, keys.hello)
            assert isinstance(await session.call(Abort(reason="enough"), timeout_s=5), Aborted)
            with pytest.raises((PeerGone, PeerMisbehaved, OSError)):
                await run_sync(knock, prepared.data_port, session_id, keys.hello)
        assert isinstance(await fleet.ask("host-a", GetHost()), HostView)
        assert fleet.machines("host-a") == []
