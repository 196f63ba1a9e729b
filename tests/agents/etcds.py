"""Real etcds for tests, and a way to them that loses answers."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.abc
import httpx
import pytest

from agents.ownership.place import EtcdPlace
from tests.agents.host.fleet import free_port
from tests.agents.parted import Networks
from tests.transport.certificates import Files
from tests.waiting import until_blocking

__all__ = [
    "Cluster",
    "Etcd",
    "LosingProxy",
    "Member",
    "losing_proxy",
    "place_of",
    "running_cluster",
    "running_etcd",
]

ETCD = shutil.which("etcd")
STARTS_WITHIN_S = 20.0
MEMBERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Etcd:
    """One member that is its own cluster."""

    port: int
    process: subprocess.Popen[bytes]
    url: str


@contextmanager
def running_etcd(folder: Path, tls: Files | None = None) -> Iterator[Etcd]:
    """One etcd that ends with the block; with `tls` it asks for client certificates of that CA."""
    if ETCD is None:
        pytest.skip("needs etcd (Debian: apt-get install etcd-server)")
    port, peer_port = free_port(), free_port()
    scheme = "http" if tls is None else "https"
    url, peer_url = f"{scheme}://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    command = [ETCD, "--data-dir", str(folder / f"etcd-{port}"), "--unsafe-no-fsync"]
    command += ["--listen-client-urls", url, "--advertise-client-urls", url]
    command += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
    command += ["--initial-cluster", f"default={peer_url}"]
    if tls is not None:
        command += ["--cert-file", str(tls.certificate), "--key-file", str(tls.key)]
        command += ["--trusted-ca-file", str(tls.ca), "--client-cert-auth"]
    if (
        "--unsafe-no-fsync"
        not in subprocess.run([ETCD, "--help"], capture_output=True, text=True, check=False).stdout
    ):
        command.remove("--unsafe-no-fsync")  # it came with 3.5
    with (folder / f"etcd-{port}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _await_port(port, process)
        yield Etcd(port=port, process=process, url=url)
    finally:
        process.kill()
        process.wait()


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    def serves() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"etcd ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    # It listens only when it has a leader.
    until_blocking(serves, "an etcd that serves", within_s=STARTS_WITHIN_S)


@dataclass(kw_only=True)
class Member:
    """One of a cluster's members. Every method blocks."""

    name: str
    url: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    is_frozen: bool = False

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it without warning, frozen or not."""
        process, self.process, self.is_frozen = self.process, None, False
        if process is not None:
            process.kill()
            process.wait()

    def freeze(self) -> None:
        """From now on it keeps its connections and says nothing."""
        self._signal(signal.SIGSTOP)
        self.is_frozen = True

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)
        self.is_frozen = False

    def _signal(self, number: signal.Signals) -> None:
        if self.process is None:
            raise AssertionError(f"{self.name} is down")
        self.process.send_signal(number)

    def answers(self) -> bool:
        """Tell whether it answers a linearizable read."""
        try:
            self.ask("/v3/kv/range", {"key": "AA=="})
        except httpx.HTTPError:
            return False
        return True

    def ask(self, path: str, question: dict[str, object]) -> dict[str, object]:
        """Ask this member alone. Raises httpx.HTTPError."""
        answer = httpx.post(f"{self.url}{path}", json=question, timeout=2.0, trust_env=False)
        answer.raise_for_status()
        told = answer.json()
        if not isinstance(told, dict):
            raise AssertionError(told)
        return told


@dataclass(kw_only=True)
class Cluster:
    """Members that elect one of them; with `networks` they can be parted. Every method blocks."""

    members: list[Member]
    networks: Networks | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(member.url for member in self.members)

    def leader(self) -> Member:
        """Whom a majority follows now."""

        def elected() -> Member | None:
            for member in self.members:
                if member.process is None or member.is_frozen:
                    continue
                with contextlib.suppress(httpx.HTTPError):
                    told = member.ask("/v3/maintenance/status", {})
                    if told.get("leader") == told["header"]["member_id"]:  # type: ignore[index]
                        return member
            return None

        return until_blocking(elected, "an elected leader", within_s=STARTS_WITHIN_S)

    def followers(self) -> list[Member]:
        leader = self.leader()
        return [member for member in self.members if member is not leader]

    def part(self, *some: Member) -> None:
        """Cut some members off from the others; whoever asks them reaches them all."""
        if self.networks is None:
            raise AssertionError("they have one network")
        self.networks.part([self.members.index(member) for member in some])

    def heal(self) -> None:
        """Have all members run and reach each other, and wait until each of them answers a linearizable read."""
        if self.networks is not None:
            self.networks.heal()
        for member in self.members:
            if member.process is None:
                member.start()
            elif member.is_frozen:
                member.thaw()
        for member in self.members:
            until_blocking(member.answers, f"an answer of {member.name}", within_s=STARTS_WITHIN_S)


@contextmanager
def running_cluster(folder: Path, networks: Networks | None = None) -> Iterator[Cluster]:
    """Three members of one cluster, with etcd's own timing (elections after 1 to 2 s); they end with the block."""
    if ETCD is None:
        pytest.skip("needs etcd (Debian: apt-get install etcd-server)")
    names = [f"member-{number}" for number in range(MEMBERS)]
    # All at once: one that is free for each call in turn may be the same one.
    with contextlib.ExitStack() as held:
        found = [
            held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for _ in range(2 * MEMBERS)
        ]
    ports, peer_ports = found[:MEMBERS], found[MEMBERS:]
    hosts = networks.addresses if networks else ("127.0.0.1",) * MEMBERS
    peers = {name: f"http://{host}:{port}" for name, host, port in zip(names, hosts, peer_ports, strict=True)}
    members = []
    for number, (name, host, port) in enumerate(zip(names, hosts, ports, strict=True)):
        url = f"http://{host}:{port}"
        command = [
            *(networks.prefix(number) if networks else ()),
            ETCD,
            "--name",
            name,
            "--data-dir",
            str(folder / name),
        ]
        command += ["--listen-client-urls", url, "--advertise-client-urls", url]
        command += ["--listen-peer-urls", peers[name], "--initial-advertise-peer-urls", peers[name]]
        command += ["--initial-cluster", ",".join(f"{peer}={at}" for peer, at in peers.items())]
        members.append(Member(name=name, url=url, command=command, log=folder / f"{name}.log"))
    cluster = Cluster(members=members, networks=networks)
    try:
        cluster.heal()
        yield cluster
    finally:
        for member in members:
            member.kill()


def place_of(*urls: str, timeout_s: float = 5.0, tls: Files | None = None) -> EtcdPlace:
    """How an agent would reach these."""
    files = {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key} if tls else {}
    return EtcdPlace(endpoints=urls, prefix="/vmferry", timeout_s=timeout_s, **files)


@dataclass
class LosingProxy:
    """Passes everything on, until `loses` says that answers are lost: the question still gets there."""

    url: str = ""
    loses: bool = False
    lost: int = 0


@asynccontextmanager
async def losing_proxy(etcd: Etcd) -> AsyncIterator[LosingProxy]:
    """A proxy before an etcd; it ends with the block."""
    proxy = LosingProxy()

    async def serve(near: anyio.abc.SocketStream) -> None:
        async with (
            near,
            await anyio.connect_tcp("127.0.0.1", etcd.port) as far,
            anyio.create_task_group() as ways,
        ):

            async def forth() -> None:
                async for part in near:
                    await far.send(part)
                ways.cancel_scope.cancel()

            async def back() -> None:
                async for part in far:
                    if proxy.loses:
                        proxy.lost += 1
                        break
                    await near.send(part)
                ways.cancel_scope.cancel()

            ways.start_soon(forth)
            ways.start_soon(back)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    proxy.url = f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        try:
            yield proxy
        finally:
            tasks.cancel_scope.cancel()
