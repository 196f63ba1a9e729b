"""Settings of the agent and of the command line: read from TOML once, checked whole, then frozen.

Law: every mistake of a file is reported at once, by its key; nothing is started on a file with one. This is the only
reader of configuration, and the numbers and defaults in here are the only ones. docs/configuration.md shows every key
with its default; the tests load that page.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

from agents import pki
from agents.authorization import RIGHTS_OF_ROLE, AccessPolicy, AccessRule, Right, is_identity
from agents.config_etcd import etcd_place
from agents.errors import ConfigInvalid, PkiRefused, SettingsError
from agents.hypervisors.qemu.spec import Accel
from agents.ownership.place import EtcdPlace
from agents.revocation import read_list
from agents.sections import (
    Endpoint,
    Section,
    cap,
    choice,
    duration,
    endpoint,
    integer,
    listed,
    loopback,
    paths,
    ratio,
    read_toml,
    size,
    text,
)
from agents.storageproof.pools import is_uri
from agents.storageproof.urls import problem_of_pattern
from migrate.compression import Compression
from migrate.plan import OnTimeout
from migrate.source_ports import DELTA_CACHE_BYTES
from transport.identity import Role
from transport.limits import MAX_GUEST_NAME_CHARS, MAX_WINDOW_BYTES, MIN_DEAD_PEER_S, WINDOW_BYTES

__all__ = [
    "AgentSettings",
    "ClientSettings",
    "Compression",
    "EmbeddedSettings",
    "Endpoint",
    "EventLoop",
    "LimitSettings",
    "LogFormat",
    "LogLevel",
    "MoveDefaults",
    "OnTimeout",
    "QemuSettings",
    "Settings",
    "TlsSettings",
    "client_config_path",
    "load_client_settings",
    "load_settings",
]

CONFIG_VARIABLE: Final = "VMFERRY_CONFIG"

# A host that runs more migrations at once than this finishes none of them sooner.
MAX_MIGRATIONS: Final = 64
# Each connection costs a thread and record buffers at both ends; no link needs more than this many to fill.
MAX_CONNECTIONS: Final = 16
# Two full records: with less, sealing and sending could not overlap. The largest is what a peer may ask for.
MIN_WINDOW_BYTES: Final = 2 << 20
# No working set that is larger is written again often enough for its copies to pay.
MAX_DELTA_CACHE_BYTES: Final = 64 << 30
DAY_S: Final = 86400.0
# Below, not even the smallest guest fits; above, a ratio says nothing any more (guests that share most of their pages).
MEMORY_RATIOS: Final = (0.1, 16.0)
# The default, 16, is what clouds for idle guests take; above 100 no guest gets a CPU in time.
CPU_RATIOS: Final = (0.1, 100.0)
# Names of operators and hosts, with wildcards.
_NAME_PATTERN: Final = re.compile(r"[a-z0-9.*?-]{1,63}", re.ASCII)


class EventLoop(StrEnum):
    """What the agent runs on."""

    ASYNCIO = "asyncio"
    TRIO = "trio"


class LogLevel(StrEnum):
    """The least important lines that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How lines are written: `event key=value`, or one JSON object a line."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """[agent]"""

    name: str
    listen: Endpoint
    data_listen: Endpoint
    metrics_listen: Endpoint
    state_dir: Path
    audit_log: Path
    log_level: LogLevel
    log_format: LogFormat
    event_loop: EventLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """[tls]: files that exist and prove the identity; no list of revoked certificates (None) revokes none."""

    ca: Path
    certificate: Path
    key: Path
    crl: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedSettings:
    """[guests.embedded]; no limit (None) is what the host has."""

    dir: Path
    memory_limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuSettings:
    """[guests.qemu]: what a QEMU guest may be on this host. What is not named is not allowed."""

    dir: Path
    binary: Path
    accels: tuple[Accel, ...]
    kernel_dirs: tuple[Path, ...]
    bridges: tuple[str, ...]
    taps: tuple[str, ...]
    memory_dir: Path
    memory_limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """[limits]; no bandwidth (None) is no cap. An overcommit is how often this host promises what it has to guests."""

    outgoing: int
    incoming: int
    connections: int
    window_bytes: int
    delta_cache_bytes: int
    bandwidth_bytes_per_s: int | None
    outage_s: float
    dead_peer_s: float
    memory_overcommit: float
    cpu_overcommit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveDefaults:
    """[defaults] of a move that does not say otherwise; a timeout of 0 is none."""

    downtime_limit_s: float
    timeout_s: float
    on_timeout: OnTimeout
    compression: Compression


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The agent's whole configuration. `peers` are the control addresses of other hosts by their names; `etcd` is None
    where the file has no [storage.etcd].

    `embedded` and `qemu` are None where the file has no [guests.embedded] or [guests.qemu]: this host runs no such
    guests.
    """

    agent: AgentSettings
    tls: TlsSettings
    access: AccessPolicy
    peers: Mapping[str, Endpoint]
    shared_dirs: tuple[Path, ...]
    shared_devices: tuple[str, ...]
    network_disks: tuple[str, ...]
    libvirt: str
    etcd: EtcdPlace | None
    embedded: EmbeddedSettings | None
    qemu: QemuSettings | None
    limits: LimitSettings
    defaults: MoveDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """The command line's whole configuration. `hosts` are the control addresses of agents by their names."""

    tls: TlsSettings
    hosts: Mapping[str, Endpoint]


def load_settings(path: Path) -> Settings:
    """Read and check an agent's configuration, with the files it names.

    Raises:
        ConfigInvalid: it has mistakes; `problems` has all of them.
    """
    problems: list[str] = []
    root = Section(read_toml(path), "", problems)
    base = path.absolute().parent
    agent = _agent(root.section("agent"), base)
    guests = root.section("guests")
    storage = root.section("storage")
    settings = Settings(
        agent=agent,
        tls=_tls(root, base, pki.Role.AGENT, agent.name or None),
        access=AccessPolicy(host=agent.name, rules=tuple(_rules(root))),
        peers=_addresses(root, "peers", own_name=agent.name),
        shared_dirs=_shared_dirs(storage, base),
        shared_devices=_shared_devices(storage),
        network_disks=_network_disks(storage),
        libvirt=_libvirt(storage),
        etcd=etcd_place(storage, base),
        embedded=_embedded(guests, base),
        qemu=_qemu(guests, base),
        limits=_limits(root.section("limits")),
        defaults=_defaults(root.section("defaults")),
    )
    guests.finish()
    storage.finish()
    root.finish()
    if problems:
        raise ConfigInvalid(path, tuple(problems))
    return settings


def load_client_settings(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> ClientSettings:
    """Read and check the command line's configuration: `path`, or the one that `client_config_path` finds.

    Raises:
        ConfigInvalid: it has mistakes; `problems` has all of them.
    """
    path = path or client_config_path(environ)
    problems: list[str] = []
    root = Section(read_toml(path), "", problems)
    settings = ClientSettings(
        tls=_tls(root, path.absolute().parent, pki.Role.OPERATOR, None),
        hosts=_addresses(root, "hosts", own_name=None),
    )
    if not settings.hosts and not problems:
        root.note("hosts", 'is missing; name each agent: [hosts.host-a] address = "host-a:7700"')
    root.finish()
    if problems:
        raise ConfigInvalid(path, tuple(problems))
    return settings


def client_config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Find the command line's configuration: $VMFERRY_CONFIG, else below $XDG_CONFIG_HOME or ~/.config."""
    if chosen := environ.get(CONFIG_VARIABLE):
        return Path(chosen)
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    return Path(base, "vmferry", "client.toml")


def default_connections() -> int:
    """As many connections as cores that compress. More than four, each with a window, are for the operator to ask."""
    return min(len(os.sched_getaffinity(0)), 4)


def _agent(section: Section, base: Path) -> AgentSettings:
    listening = endpoint(may_be_any_port=True)
    state_dir = section.optional("state_dir", paths(base), Path("/var/lib/vmferry"))
    agent = AgentSettings(
        name=section.required("name", text, ""),
        listen=section.optional("listen", listening, Endpoint("0.0.0.0", 7700)),
        data_listen=section.optional("data_listen", listening, Endpoint("0.0.0.0", 7701)),
        metrics_listen=section.optional("metrics_listen", loopback, Endpoint("127.0.0.1", 7702)),
        state_dir=state_dir,
        audit_log=section.optional("audit_log", paths(base), state_dir / "audit.jsonl"),
        log_level=section.optional("log_level", choice(LogLevel), LogLevel.INFO),
        log_format=section.optional("log_format", choice(LogFormat), LogFormat.TEXT),
        event_loop=section.optional("event_loop", choice(EventLoop), EventLoop.ASYNCIO),
    )
    if agent.name and not pki.NAME.fullmatch(agent.name):
        section.note("name", f"{agent.name!r} is not a name: 1 to 63 of a-z 0-9 . - after a letter or digit")
    listening_on = {
        "listen": agent.listen,
        "data_listen": agent.data_listen,
        "metrics_listen": agent.metrics_listen,
    }
    for (key, address), (other_key, other) in itertools.combinations(listening_on.items(), 2):
        if _overlap(address, other):
            section.note(other_key, f"{other} cannot be listened on beside {key} = {address}")
    section.finish()
    return agent


def _overlap(one: Endpoint, other: Endpoint) -> bool:
    everywhere = {"0.0.0.0", "::"}
    same_host = one.host == other.host or one.host in everywhere or other.host in everywhere
    return same_host and one.port == other.port != 0


def _tls(root: Section, base: Path, role: pki.Role, name: str | None) -> TlsSettings:
    section = root.section("tls")
    missing = Path()
    tls = TlsSettings(
        ca=section.required("ca", paths(base), missing),
        certificate=section.required("certificate", paths(base), missing),
        key=section.required("key", paths(base), missing),
        crl=section.optional("crl", paths(base), None),
    )
    if missing not in (tls.ca, tls.certificate, tls.key):
        for problem in pki.identity_problems(
            certificate=tls.certificate, key=tls.key, ca=tls.ca, role=role, name=name
        ):
            root.note("tls", problem)
        if tls.crl is not None:
            try:
                read_list(tls.crl, tls.ca)
            except PkiRefused as exc:
                root.note("tls.crl", str(exc))
    section.finish()
    return tls


def _rules(root: Section) -> Iterator[AccessRule]:
    for number, section in enumerate(root.tables("allow")):
        nobody: tuple[str, ...] = ()
        names = {role: section.optional(f"{role}s", _patterns, nobody) for role in Role}
        named = [role for role in Role if f"{role}s" in section]
        if len(named) != 1:
            section.note("operators", "name either operators or agents, and not both; * is all of them")
        role = named[0] if named else Role.OPERATOR
        nothing: tuple[Right, ...] = ()
        rule = AccessRule(
            key=f"allow[{number}]",
            role=role,
            names=names[role],
            may=frozenset(section.required("may", listed(choice(Right)), nothing)),
            guests=section.optional("guests", _guest_patterns, ("*",)),
            sources=section.optional("from", _patterns, ("*",)),
            destinations=section.optional("to", _patterns, ("*",)),
        )
        if odd := sorted(rule.may - RIGHTS_OF_ROLE[role]):
            listing = ", ".join(sorted(RIGHTS_OF_ROLE[role]))
            section.note("may", f"{role}s may not {', '.join(odd)}; they can be given {listing}")
        section.finish()
        yield rule


def _patterns(value: object) -> tuple[str, ...]:
    """Read names of operators or hosts, with wildcards."""
    names = _some(value)
    for name in names:
        if not _NAME_PATTERN.fullmatch(name):
            raise SettingsError(f"{name[:80]!r} is no name: 1 to 63 of a-z 0-9 . - and the wildcards * and ?")
    return names


def _guest_patterns(value: object) -> tuple[str, ...]:
    """Read names of guests with wildcards, and identities."""
    names = _some(value)
    for name in names:
        if len(name) > MAX_GUEST_NAME_CHARS or "[" in name:
            raise SettingsError(
                f"{name[:80]!r} is no guest: a name of at most {MAX_GUEST_NAME_CHARS} characters with the wildcards "
                "* and ?, or an identity"
            )
    return tuple(name.lower() if is_identity(name.lower()) else name for name in names)


def _some(value: object) -> tuple[str, ...]:
    names = listed(text)(value)
    if not names:
        raise SettingsError('is empty, so that the rule is about nobody; ["*"] is all')
    return names


def _addresses(root: Section, key: str, own_name: str | None) -> Mapping[str, Endpoint]:
    addresses: dict[str, Endpoint] = {}
    for name, section in root.sections(key).items():
        if not pki.NAME.fullmatch(name):
            root.note(f"{key}.{name}", "is not the name of a host: 1 to 63 of a-z 0-9 . -")
        if name == own_name:
            root.note(f"{key}.{name}", "is this host itself; list the others only")
        addresses[name] = section.required("address", endpoint(may_be_any_port=False), Endpoint("", 0))
        section.finish()
    return MappingProxyType(addresses)


def _shared_dirs(section: Section, base: Path) -> tuple[Path, ...]:
    nowhere: tuple[Path, ...] = ()
    folders = section.required("shared_dirs", listed(paths(base)), nowhere)
    if "shared_dirs" in section and not folders:
        section.note("shared_dirs", "names no directory; without one no guest's owner can be decided")
    for folder in folders:
        if not folder.is_dir():
            section.note("shared_dirs", f"{folder} is not a directory; is it mounted?")
    return folders


def _shared_devices(section: Section) -> tuple[str, ...]:
    none: tuple[str, ...] = ()
    patterns = section.optional("shared_devices", listed(text), none)
    for pattern in patterns:
        # Outside of /dev anybody may make a link that a pattern fits.
        if not pattern.startswith("/dev/") or os.path.normpath(pattern) != pattern or "\0" in pattern:
            section.note("shared_devices", f"{pattern!r} is no path below /dev, such as /dev/mapper/guest-*")
    return patterns


def _network_disks(section: Section) -> tuple[str, ...]:
    none: tuple[str, ...] = ()
    patterns = section.optional("network_disks", listed(text), none)
    for pattern in patterns:
        if (problem := problem_of_pattern(pattern)) is not None:
            section.note("network_disks", problem)
    return patterns


def _libvirt(section: Section) -> str:
    uri = section.optional("libvirt", text, "")
    if uri and not is_uri(uri):
        section.note("libvirt", f"{uri!r} is no address of a libvirt, such as qemu:///system")
    return uri


def _embedded(guests: Section, base: Path) -> EmbeddedSettings | None:
    is_used = "embedded" in guests
    section = guests.section("embedded")
    embedded = None
    if is_used:
        embedded = EmbeddedSettings(
            dir=section.optional("dir", paths(base), Path("/run/vmferry/guests")),
            memory_limit_bytes=section.optional("memory_limit", size(at_least=1 << 20), None),
        )
    section.finish()
    return embedded


def _qemu(guests: Section, base: Path) -> QemuSettings | None:
    is_used = "qemu" in guests
    section = guests.section("qemu")
    nobody: tuple[str, ...] = ()
    nowhere: tuple[Path, ...] = ()
    qemu = None
    if is_used:
        qemu = QemuSettings(
            dir=section.optional("dir", paths(base), Path("/run/vmferry/qemu")),
            binary=section.optional("binary", paths(base), Path("/usr/bin/qemu-system-x86_64")),
            accels=section.optional("accels", listed(choice(Accel)), (Accel.KVM,)),
            kernel_dirs=section.optional("kernel_dirs", listed(paths(base)), nowhere),
            bridges=section.optional("bridges", listed(text), nobody),
            taps=section.optional("taps", listed(text), nobody),
            memory_dir=section.optional("memory_dir", paths(base), Path("/dev/shm")),
            memory_limit_bytes=section.optional("memory_limit", size(at_least=1 << 20), None),
        )
        if not os.access(qemu.binary, os.X_OK):
            section.note(
                "binary", f"{qemu.binary} cannot be executed; Debian: apt-get install qemu-system-x86"
            )
        if not qemu.accels:
            section.note("accels", "names none, so that no guest could run")
    section.finish()
    return qemu


def _limits(section: Section) -> LimitSettings:
    limits = LimitSettings(
        outgoing=section.optional("outgoing", integer(1, MAX_MIGRATIONS), 4),
        incoming=section.optional("incoming", integer(1, MAX_MIGRATIONS), 4),
        connections=section.optional("connections", integer(1, MAX_CONNECTIONS), default_connections()),
        window_bytes=section.optional("window", size(MIN_WINDOW_BYTES, MAX_WINDOW_BYTES), WINDOW_BYTES),
        delta_cache_bytes=section.optional("delta_cache", size(0, MAX_DELTA_CACHE_BYTES), DELTA_CACHE_BYTES),
        bandwidth_bytes_per_s=section.optional("bandwidth", cap, None),
        outage_s=section.optional("outage", duration(0.0, DAY_S), 300.0),
        dead_peer_s=section.optional("dead_peer", duration(MIN_DEAD_PEER_S, 3600.0), 10.0),
        memory_overcommit=section.optional("memory_overcommit", ratio(*MEMORY_RATIOS), 1.0),
        cpu_overcommit=section.optional("cpu_overcommit", ratio(*CPU_RATIOS), 16.0),
    )
    section.finish()
    return limits


def _defaults(section: Section) -> MoveDefaults:
    defaults = MoveDefaults(
        downtime_limit_s=section.optional("downtime_limit", duration(0.001, 3600.0), 0.3),
        timeout_s=section.optional("timeout", duration(0.0, 7 * DAY_S), 0.0),
        on_timeout=section.optional("on_timeout", choice(OnTimeout), OnTimeout.ABORT),
        compression=section.optional("compression", choice(Compression), Compression.AUTO),
    )
    section.finish()
    return defaults
