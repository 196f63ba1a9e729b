"""Two real agents in one event loop, with real certificates, ports, guests and shared storage."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType

import anyio
from anyio.streams.tls import TLSStream

from agents import pki
from agents.api import CONTROL_SCHEMA, JobList, JobStarted, JobView, ListJobs, Move, Watch
from agents.config import load_settings
from agents.host.agent import HostAgent
from agents.hypervisors.confinement import ROOT
from agents.hypervisors.embedded.client import Description, GuestClient, start_guest
from agents.hypervisors.embedded.errors import EmbeddedError
from agents.hypervisors.embedded.rundir import GuestPaths
from agents.hypervisors.embedded.spec import Content, EmbeddedSpec
from agents.revocation import revoke
from migrate.phases import Phase
from migrate.stats import Report
from tests.transport.certificates import Authority
from tests.waiting import until
from transport.dial import connect, peer_serial
from transport.tls import Identity, Role, client_context
from transport.wire import MessageChannel

HOSTS = ("host-a", "host-b")
# With this a guest of 16 MiB of noise is on its way for more than 4 s: until a test lets it go.
SLOW = 4 << 20
NOISE: dict[str, object] = {
    "content": Content.INCOMPRESSIBLE,
    "dirty_bytes_per_s": 1 << 20,
    "working_set_bytes": 1 << 20,
}


def report_of(view: JobView) -> Report:
    """The report of a job that has ended."""
    if view.report is None:
        raise AssertionError(view)
    return view.report


def in_precopy(view: JobView) -> bool:
    """Pages are on their way and the guest runs."""
    return view.phase is Phase.PRECOPY and view.progress.wire_bytes > 0


ALLOW_ALL = (
    '[[allow]]\noperators = ["*"]\nmay = ["view", "move", "resolve"]\n'
    '[[allow]]\nagents = ["*"]\nmay = ["send-guests"]\n'
)


@dataclass
class Fleet:
    """Where everything of one test is."""

    folder: Path
    agents: dict[str, HostAgent] = field(default_factory=dict)
    control_ports: dict[str, int] = field(default_factory=dict)
    data_ports: dict[str, int] = field(default_factory=dict)
    metrics_ports: dict[str, int] = field(default_factory=dict)
    has_ended: dict[str, anyio.Event] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=lambda: dict.fromkeys(HOSTS, "127.0.0.1"))
    # Where its peers find a host, if that is another address than its own.
    fronts: dict[str, str] = field(default_factory=dict)

    rules: str = ALLOW_ALL
    # The storage of a host, where it is not what the others see.
    shared_at: dict[str, Path] = field(default_factory=dict)
    has_crl: bool = False

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def guests_dir(self, host: str) -> Path:
        return self.folder / host / "guests"

    def state_dir(self, host: str) -> Path:
        return self.folder / host / "state"

    def issue(self) -> None:
        """Make the certificates, the directories and the shared storage."""
        certificates = self.folder / "pki"
        pki.init_ca(certificates, "test")
        for host in HOSTS:
            pki.issue(certificates, pki.Role.AGENT, host)
            self.guests_dir(host).mkdir(parents=True, exist_ok=True, mode=0o700)
        pki.issue(certificates, pki.Role.OPERATOR, "tester")
        self.shared.mkdir(exist_ok=True)

    def issue_from(
        self, authority: Authority, valid_for: Mapping[str, timedelta] = MappingProxyType({})
    ) -> None:
        """Put certificates of another CA in place of those that `issue` made; by host, for how long, or for a day."""
        certificates = self.folder / "pki"
        shutil.copy(authority.certificate, certificates / "ca.crt")
        for role, name in (*(("agent", host) for host in HOSTS), ("operator", "tester")):
            files = authority.issue(
                f"vmferry://{role}/{name}", valid_for=valid_for.get(name, timedelta(days=1))
            )
            shutil.copy(files.certificate, certificates / f"{role}-{name}.crt")
            key = certificates / f"{role}-{name}.key"
            key.unlink()
            key.touch(mode=0o600)
            key.write_bytes(files.key.read_bytes())

    def write_config(
        self,
        host: str,
        control_ports: dict[str, int],
        *,
        limits: str = "",
        embedded: str = "",
        qemu: str = "",
        etcd: str = "",
        storage: str = "",
        event_loop: str = "asyncio",
    ) -> Path:
        """Write one agent's configuration; it listens on its own of `control_ports`, its peers on theirs."""
        path = self.folder / f"{host}.toml"
        listed = "".join(
            f'[peers.{name}]\naddress = "{self.fronts.get(name, self.addresses[name])}:{port}"\n'
            for name, port in control_ports.items()
            if name != host
        )
        path.write_text(
            f"""
[agent]
name = "{host}"
listen = "{self.addresses[host]}:{control_ports[host]}"
data_listen = "{self.addresses[host]}:0"
metrics_listen = "127.0.0.1:0"
state_dir = "{self.state_dir(host)}"
log_format = "json"
event_loop = "{event_loop}"
[tls]
ca = "pki/ca.crt"
certificate = "pki/agent-{host}.crt"
key = "pki/agent-{host}.key"
{'crl = "pki/ca.crl"' if self.has_crl else ""}
{self.rules}[storage]
shared_dirs = ["{self.shared_at.get(host, self.shared)}"]
{storage}
{etcd and "[storage.etcd]"}
{etcd}
[guests.embedded]
dir = "{self.guests_dir(host)}"
{embedded}
{qemu and self._qemu(host, qemu)}
[limits]
{limits or 'outage = "5s"'}
{listed}
"""
        )
        return path

    def _qemu(self, host: str, lines: str) -> str:
        defaults = {"accels": '["tcg"]', "kernel_dirs": f'["{self.folder / "boot"}"]'}
        # A host whose QEMU is another one: see `wrapped_qemu`.
        wrapped = self.folder / host / "qemu-wrapped"
        if wrapped.exists():
            defaults["binary"] = f'"{wrapped}"'
        told = "".join(f"{key} = {value}\n" for key, value in defaults.items() if key not in lines)
        return f'[guests.qemu]\ndir = "{self.qemu_dir(host)}"\n{told}{lines}'

    def qemu_dir(self, host: str) -> Path:
        return self.folder / host / "qemu"

    def start_guest(self, host: str, **changed: object) -> EmbeddedSpec:
        """Start a small busy guest with a disk on the shared storage."""
        disk = self.shared / f"{uuid.uuid4().hex[:8]}.img"
        # The sectors that the guest writes in turn; with fewer it finds errors after so many heartbeats.
        disk.write_bytes(bytes(64 << 10))
        values: dict[str, object] = {
            "guest_id": str(uuid.uuid4()),
            "name": "worker",
            "ram_bytes": 64 << 20,
            "fill_bytes": 16 << 20,
            "dirty_bytes_per_s": 20 << 20,
            "working_set_bytes": 8 << 20,
            "disk_path": str(disk),
            **changed,
        }
        spec = EmbeddedSpec(**values)  # type: ignore[arg-type]
        start_guest(spec, self.guests_dir(host))
        return spec

    async def serial(self, host: str) -> str:
        """The serial number of the certificate that one agent shows now."""
        async with await self._dial(host) as stream:
            return peer_serial(stream)

    @asynccontextmanager
    async def operator(self, host: str) -> AsyncIterator[MessageChannel]:
        """An operator's channel to one agent."""
        channel = MessageChannel(await self._dial(host), CONTROL_SCHEMA)
        try:
            yield channel
        finally:
            await channel.aclose()

    async def _dial(self, host: str) -> TLSStream:
        certificates = self.folder / "pki"
        context = client_context(
            certificates / "operator-tester.crt",
            certificates / "operator-tester.key",
            certificates / "ca.crt",
        )
        return await connect(
            self.addresses[host],
            self.control_ports[host],
            context,
            expect=Identity(role=Role.AGENT, name=host),
            timeout_s=5,
        )

    async def ask(self, host: str, request: object) -> object:
        """Ask one agent one thing."""
        with anyio.fail_after(30):
            async with self.operator(host) as channel:
                await channel.send(request)
                return await channel.receive()

    async def follow(self, host: str, job: str) -> JobView:
        """Wait for the end of a job."""
        with anyio.fail_after(60):
            async with self.operator(host) as channel:
                await channel.send(Watch(job=job))
                while True:
                    view = await channel.receive()
                    if not isinstance(view, JobView):
                        raise AssertionError(view)
                    if view.has_ended:
                        return view

    async def start(self, guest: str, source: str, to: str, **wishes: object) -> str:
        """Start a move, give its job."""
        started = await self.ask(source, Move(guest=guest, to=to, **wishes))  # type: ignore[arg-type]
        if not isinstance(started, JobStarted):
            raise AssertionError(started)
        return started.job

    async def move(self, guest: str, source: str, to: str, **wishes: object) -> JobView:
        """Move a guest and wait for the end."""
        return await self.follow(source, await self.start(guest, source, to, **wishes))

    async def until(self, host: str, job: str, holds: Callable[[JobView], bool]) -> JobView:
        """Follow a job until it looks as asked for; it must before it ends."""
        with anyio.fail_after(30):
            async with self.operator(host) as channel:
                await channel.send(Watch(job=job))
                while True:
                    view = await channel.receive()
                    if not isinstance(view, JobView):
                        raise AssertionError(view)
                    if holds(view):
                        return view
                    if view.has_ended:
                        raise AssertionError(view)

    async def job_at(self, host: str, guest_id: str) -> JobView:
        """Wait until an agent has a job of this guest; give the latest one."""

        async def jobs() -> list[JobView]:
            listed = await self.ask(host, ListJobs())
            if not isinstance(listed, JobList):
                raise AssertionError(listed)
            return [job for job in listed.jobs if job.guest_id == guest_id]

        return (await until(jobs, f"a job of {guest_id} at {host}", within_s=30))[-1]

    def describe(self, host: str, guest_id: str) -> Description:
        """What the guest's process on a host says of itself."""
        client = GuestClient(GuestPaths.of_guest(self.guests_dir(host), guest_id).socket)
        try:
            return client.describe()
        finally:
            client.close()

    def machines(self, host: str) -> list[str]:
        """The guests' sockets on a host; those of empty machines too."""
        return sorted(path.name for path in self.guests_dir(host).glob("*.sock"))

    async def check_runs_only_at(self, host: str, guest_id: str) -> None:
        """Insist that the guest runs on `host`, does work, is whole, and that no machine of it is elsewhere."""
        for other in HOSTS:
            if other != host and any(guest_id in name for name in self.machines(other)):
                raise AssertionError(f"a machine of the guest is on {other}")
        before = self.describe(host, guest_id)
        await until(lambda: self.describe(host, guest_id).ticks > before.ticks, "work of the guest")
        after = self.describe(host, guest_id)
        if (after.state, after.fault, after.errors) != ("running", "", 0):
            raise AssertionError(after)

    async def page(self, host: str, path: str) -> tuple[int, str]:
        """Get a page of the metrics port: status and body."""
        port = self.metrics_ports[host]
        with anyio.fail_after(10):
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                answer = b""
                with contextlib.suppress(anyio.EndOfStream):
                    while True:
                        answer += await stream.receive()
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()


# Lines of a configuration: for both hosts, or for each.
Lines = str | Mapping[str, str]


def _lines(lines: Lines, host: str) -> str:
    return lines if isinstance(lines, str) else lines.get(host, "")


@asynccontextmanager
async def running_fleet(
    folder: Path,
    limits: Lines = "",
    embedded: Lines = "",
    qemu: Lines = "",
    authority: Authority | None = None,
    rules: str = ALLOW_ALL,
    crl: bool = False,
    etcd: str | Mapping[str, str] = "",
    shared_at: Mapping[str, Path] = MappingProxyType({}),
    valid_for: Mapping[str, timedelta] = MappingProxyType({}),
    roots: Mapping[str, Path] = MappingProxyType({}),
    fronts: Mapping[str, str] = MappingProxyType({}),
    storage: str = "",
) -> AsyncIterator[Fleet]:
    """Two agents that know each other, in this process and loop; both end with the block.

    Lines of the configuration are for both hosts, or those of each. `rules` are what both allow. With `crl` they have a
    list that revokes nobody yet. `shared_at` is the storage of a host that does not see what the others do.
    `qemu` are more lines of [guests.qemu]; without any, the agents run no such guests. `authority` issues their
    certificates where a test needs more of that CA than `agents.pki` gives, by host for `valid_for`.
    `etcd` are lines of [storage.etcd], or those of each host, `storage` of [storage]. A host in `roots` finds its
    kernel's files there and not in /. `fronts` are the addresses where peers find a host, and where the test puts
    something in front of it.
    """
    fleet = Fleet(folder, rules=rules, has_crl=crl, shared_at=dict(shared_at), fronts=dict(fronts))
    fleet.issue()
    if crl:
        revoke(folder / "pki", ())
    if authority is not None:
        fleet.issue_from(authority, valid_for)
    async with anyio.create_task_group() as tasks:
        ports = {host: free_port() for host in HOSTS}
        for host in HOSTS:
            config = fleet.write_config(
                host,
                ports,
                limits=_lines(limits, host),
                embedded=_lines(embedded, host),
                qemu=_lines(qemu, host),
                etcd=etcd if isinstance(etcd, str) else etcd[host],
                storage=storage,
            )
            agent = fleet.agents[host] = HostAgent(load_settings(config), root=roots.get(host, ROOT))
            listening = anyio.Event()

            def note(
                control: int, data: int, metrics: int, host: str = host, event: anyio.Event = listening
            ) -> None:
                fleet.control_ports[host] = control
                fleet.data_ports[host] = data
                fleet.metrics_ports[host] = metrics
                event.set()

            ended = fleet.has_ended[host] = anyio.Event()

            async def run(
                agent: HostAgent = agent, on_listening: object = note, ended: anyio.Event = ended
            ) -> None:
                await agent.run(on_listening=on_listening)  # type: ignore[arg-type]
                ended.set()

            tasks.start_soon(run)
            await listening.wait()
        try:
            yield fleet
        finally:
            for agent in fleet.agents.values():
                agent.ask_to_end()
                agent.ask_to_end()
            # A test that failed cancels this block: the agents still end in order, so that it fails of one cause.
            with anyio.move_on_after(15, shield=True):
                for ended in fleet.has_ended.values():
                    await ended.wait()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder with a short name, because sockets are in it; the embedded guests of its hosts end with the block."""
    path = Path(tempfile.mkdtemp(prefix="vmferry-"))
    try:
        yield path
    finally:
        fleet = Fleet(path)
        for host in HOSTS:
            for socket_path in fleet.guests_dir(host).glob("*.sock"):
                try:
                    client = GuestClient(socket_path)
                except EmbeddedError:
                    continue  # it has ended
                try:
                    client.quit()
                    client.await_end()
                finally:
                    client.close()
        shutil.rmtree(path)


# Below those that the kernel gives to connections: one of these stays free until its agent listens on it.
_PORTS_END = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
# From anywhere, because other runs of these tests may go on beside this one.
_ports = iter(range(random.randrange(_PORTS_END // 3, _PORTS_END * 2 // 3), _PORTS_END))


def free_port() -> int:
    """A port that nobody has now, that no connection is given by chance, and that this never gives again."""
    for port in _ports:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"no port is free below {_PORTS_END}")


def cut_connections(port: int) -> int:
    """Break all connections of this process to a port of its own, as a failing network would; how many."""
    cut = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptor = os.dup(int(name))
        except OSError:
            continue
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            continue
        with socket.socket(fileno=descriptor) as sock:
            try:
                if sock.family == socket.AF_INET and sock.getpeername()[1] == port:
                    sock.shutdown(socket.SHUT_RDWR)
                    cut += 1
            except OSError:
                continue
    return cut
