"""Real etcds for tests, and a way to them that loses answers."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.abc
import pytest

from agents.ownership.gateway import EtcdPlace
from tests.agents.host.fleet import free_port
from tests.transport.certificates import Files

__all__ = ["Etcd", "LosingProxy", "losing_proxy", "place_of", "running_etcd"]

ETCD = shutil.which("etcd")
STARTS_WITHIN_S = 10.0


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
    ends = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < ends and process.poll() is None:
        # It listens only when it has a leader.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError("etcd did not start")


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
