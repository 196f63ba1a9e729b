"""The demo's scene: a directory with shared storage, certificates, configurations and logs, and two agents.

Law: everything that is made here is in the directory, and everything that is started here is ended here, within
bounds, on every way out. Ports are chosen by the kernel.

Tasks of `running_agents`: one watches each agent's process, one is the cutter's, where there is one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import anyio
import anyio.abc

from agents import pki
from agents.config import ClientSettings, Endpoint, EventLoop, TlsSettings
from agents.demo.cutter import Cutter
from agents.demo.errors import AgentDidNotStart, AgentEnded

__all__ = ["HOSTS", "Agents", "Scratch", "open_scratch", "running_agents"]

SOURCE: Final = "host-a"
DESTINATION: Final = "host-b"
HOSTS: Final = (SOURCE, DESTINATION)
OPERATOR: Final = "demo"
HERE: Final = "127.0.0.1"
# All of 127.0.0.0/8 is this machine on Linux: the same ports on another address, with the cutter behind them.
BESIDE: Final = "127.0.0.2"
# An agent listens after some 0.5 s; a slow machine that compiles our code first needs long. One that ends is seen.
START_TIMEOUT_S: Final = 120.0
HEALTH_INTERVAL_S: Final = 0.02
# Between the kernel's choice of a port and the agent's use of it another program may take it; three times is no chance.
START_ATTEMPTS: Final = 3
# An idle agent ends in some 0.1 s, one that rolls back needs some seconds.
END_TIMEOUT_S: Final = 5.0
# What a person can use of a log in a message.
_LAST_WORDS_BYTES: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where one agent listens."""

    control: int
    data: int
    metrics: int


@dataclass(slots=True)
class Scratch:
    """The directory's paths. It stays at the end if `is_kept` then."""

    folder: Path
    is_kept: bool = False
    has_qemu: bool = False

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    @property
    def certificates(self) -> Path:
        return self.folder / "pki"

    def guests_dir(self, host: str) -> Path:
        return self.folder / host / "guests"

    def qemu_dir(self, host: str) -> Path:
        return self.folder / host / "qemu"

    @property
    def boot(self) -> Path:
        """Where the kernel and the initramfs of a QEMU guest are."""
        return self.folder / "boot"

    def log(self, host: str) -> Path:
        return self.folder / f"{host}.log"

    def config(self, host: str) -> Path:
        return self.folder / f"{host}.toml"

    @property
    def logs(self) -> tuple[Path, ...]:
        """Every log that was written so far: the agents' and their guests'."""
        found = [self.log(host) for host in HOSTS]
        for host in HOSTS:
            found += sorted(self.guests_dir(host).glob("*.log"))
            found += sorted(self.qemu_dir(host).glob("*.log"))
        return tuple(path for path in found if path.exists())

    def last_words(self, host: str) -> str:
        """Give the end of an agent's log: its last line that is not empty."""
        with suppress(OSError), self.log(host).open("rb") as file:
            file.seek(max(file.seek(0, 2) - _LAST_WORDS_BYTES, 0))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            return lines[-1] if lines else ""
        return ""


@contextmanager
def open_scratch(*, keep: bool) -> Iterator[Scratch]:
    """Make the directory with everything that needs no process; remove it unless `keep`, or an error leaves.

    Raises:
        OSError, PkiRefused: the world's.
    """
    # Short: a unix socket's path has 107 bytes, and the guests' are in here.
    scratch = Scratch(Path(tempfile.mkdtemp(prefix="vmf-")), is_kept=keep)
    try:
        scratch.shared.mkdir()
        for host in HOSTS:
            scratch.guests_dir(host).mkdir(parents=True, mode=0o700)
        pki.init_ca(scratch.certificates, "vmferry demo")
        for host in HOSTS:
            pki.issue(scratch.certificates, pki.Role.AGENT, host)
        pki.issue(scratch.certificates, pki.Role.OPERATOR, OPERATOR)
        yield scratch
    except Exception:
        scratch.is_kept = True  # the reason is in its logs
        raise
    finally:
        if not scratch.is_kept:
            shutil.rmtree(scratch.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agents:
    """Two agents that serve. `cutter` stands in the way from host-a to host-b, where one was asked for.

    `pids` and `metrics` (the endpoints of /metrics) are by host, for whoever measures the agents.
    """

    settings: ClientSettings
    cutter: Cutter | None
    pids: Mapping[str, int]
    metrics: Mapping[str, Endpoint]


@asynccontextmanager
async def running_agents(
    scratch: Scratch, *, event_loop: EventLoop, with_cutter: bool
) -> AsyncIterator[Agents]:
    """Run both agents for as long as the block lasts.

    Raises:
        AgentDidNotStart: the world's.
        AgentEnded: in a group: one of them ended during the block.
    """
    for attempt in range(1, START_ATTEMPTS + 1):
        was_started = False
        try:
            async with _agents(scratch, event_loop, with_cutter=with_cutter) as agents:
                was_started = True
                yield agents
            return
        except AgentDidNotStart as exc:
            if was_started or not exc.was_in_use or attempt == START_ATTEMPTS:
                raise


@asynccontextmanager
async def _agents(scratch: Scratch, event_loop: EventLoop, *, with_cutter: bool) -> AsyncIterator[Agents]:
    async with _maybe_cutter(with_cutter) as cutter:
        free = await _free_ports(4 if cutter else 6)
        near = Ports(control=free[0], data=free[1], metrics=free[2])
        control, data = cutter.ports if cutter else (free[4], free[5])
        ports = {SOURCE: near, DESTINATION: Ports(control=control, data=data, metrics=free[3])}
        host_b = Endpoint(BESIDE if cutter else HERE, control)
        peers = {SOURCE: (DESTINATION, host_b), DESTINATION: (SOURCE, Endpoint(HERE, near.control))}
        for host in HOSTS:
            scratch.config(host).write_text(_config(scratch, host, ports[host], peers[host], event_loop))
        async with _processes(scratch) as processes:
            await _all_healthy(scratch, processes, ports)
            async with anyio.create_task_group() as tasks:
                for host, process in processes.items():
                    tasks.start_soon(_watch, scratch, host, process)
                if cutter:
                    tasks.start_soon(cutter.serve)
                yield Agents(
                    settings=_client_settings(scratch, ports),
                    cutter=cutter,
                    pids={host: process.pid for host, process in processes.items()},
                    metrics={host: Endpoint(HERE, ports[host].metrics) for host in HOSTS},
                )
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def _maybe_cutter(is_wanted: bool) -> AsyncIterator[Cutter | None]:
    if is_wanted:
        async with Cutter.open(BESIDE, HERE, ports=2) as cutter:
            yield cutter
    else:
        yield None


async def _free_ports(count: int) -> list[int]:
    listeners = [await anyio.create_tcp_listener(local_host=HERE) for _ in range(count)]
    ports = [int(listener.extra(anyio.abc.SocketAttribute.local_port)) for listener in listeners]
    for listener in listeners:
        await listener.aclose()
    return ports


def _config(
    scratch: Scratch, host: str, ports: Ports, peer: tuple[str, Endpoint], event_loop: EventLoop
) -> str:
    name, address = peer
    return f"""\
[agent]
name = "{host}"
listen = "{HERE}:{ports.control}"
data_listen = "{HERE}:{ports.data}"
metrics_listen = "{HERE}:{ports.metrics}"
state_dir = "{host}/state"
event_loop = "{event_loop}"
[tls]
ca = "pki/ca.crt"
certificate = "pki/agent-{host}.crt"
key = "pki/agent-{host}.key"
[peers.{name}]
address = "{address}"
[[allow]]
operators = ["*"]
may = ["view", "move", "resolve"]
[[allow]]
agents = ["*"]
may = ["send-guests"]
[storage]
shared_dirs = ["shared"]
[guests.embedded]
dir = "{host}/guests"
{_qemu_section(host) if scratch.has_qemu else ""}"""


def _qemu_section(host: str) -> str:
    return f"""\
[guests.qemu]
dir = "{host}/qemu"
accels = ["kvm", "tcg"]
kernel_dirs = ["boot"]
"""


def _client_settings(scratch: Scratch, ports: Mapping[str, Ports]) -> ClientSettings:
    folder = scratch.certificates
    return ClientSettings(
        tls=TlsSettings(
            ca=folder / "ca.crt",
            certificate=folder / f"operator-{OPERATOR}.crt",
            key=folder / f"operator-{OPERATOR}.key",
        ),
        hosts=MappingProxyType({host: Endpoint(HERE, ports[host].control) for host in HOSTS}),
    )


@asynccontextmanager
async def _processes(scratch: Scratch) -> AsyncIterator[dict[str, anyio.abc.Process]]:
    """Start the agents side by side; end them, whatever they do."""
    processes: dict[str, anyio.abc.Process] = {}
    try:
        for host in HOSTS:
            with scratch.log(host).open("wb") as log:
                processes[host] = await anyio.open_process(
                    [
                        sys.executable,
                        "-m",
                        "agents.cli",
                        "agent",
                        "run",
                        "--config",
                        str(scratch.config(host)),
                    ],
                    stdin=None,
                    stdout=log,
                    stderr=log,
                    cwd=Path(__file__).parents[2],
                    # A Ctrl-C at the terminal is for the demo, which then ends them in order.
                    start_new_session=True,
                )
        yield processes
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for process in processes.values():
                    tasks.start_soon(_end, process)


async def _end(process: anyio.abc.Process) -> None:
    """The first SIGTERM drains, the second rolls back at once, and the last word is SIGKILL's."""
    for signal_it in (process.terminate, process.terminate, process.kill):
        with suppress(ProcessLookupError):
            signal_it()
        with anyio.move_on_after(END_TIMEOUT_S):
            await process.wait()
            break
    await process.aclose()


async def _all_healthy(
    scratch: Scratch, processes: Mapping[str, anyio.abc.Process], ports: Mapping[str, Ports]
) -> None:
    for host, process in processes.items():
        with anyio.move_on_after(START_TIMEOUT_S) as scope:
            while not await _is_healthy(ports[host].metrics):
                if process.returncode is not None:
                    # What it wrote last may be cut off from what it wrote first; the log has all of it.
                    text = scratch.log(host).read_text(errors="replace")
                    raise AgentDidNotStart(
                        host, scratch.last_words(host), was_in_use="address already in use" in text.lower()
                    )
                await anyio.sleep(HEALTH_INTERVAL_S)
        if scope.cancelled_caught:
            raise AgentDidNotStart(host, f"no answer on /healthz in {START_TIMEOUT_S:g} s", was_in_use=False)


async def _is_healthy(port: int) -> bool:
    try:
        async with await anyio.connect_tcp(HERE, port) as stream:
            await stream.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return b" 200 " in (await stream.receive(64))[:16]
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        return False


async def _watch(scratch: Scratch, host: str, process: anyio.abc.Process) -> None:
    code = await process.wait()
    raise AgentEnded(host, code, scratch.last_words(host))
