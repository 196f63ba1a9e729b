"""`vmferry guest`: guests of this very host, without an agent.

Law: no network. What a guest prints is escaped, unless a person is attached to its console by wish.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from agents.cli.options import DURATION, call
from agents.cli.output import escaped, json_option, print_json, print_table
from agents.errors import Ambiguous, ConfigInvalid, NotFound
from agents.units import approx_size

if TYPE_CHECKING:
    from agents.hypervisors.local import LocalGuest, LocalHypervisor

__all__ = ["guest"]

DEFAULT_CONFIG: Final = Path("/etc/vmferry/agent.toml")
DEFAULT_DIR: Final = Path("/run/vmferry/guests")
KINDS: Final = ("embedded", "qemu")

_dir_option = click.option(
    "--dir",
    "guests_dir",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Where embedded guests are.  [default: the configuration's, or {DEFAULT_DIR}]",
)
_config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The agent's configuration: what QEMU guests may be here.  [default: {DEFAULT_CONFIG}, if it is there]",
)


@click.group(
    epilog="""\
\b
Examples:
  vmferry guest start web1.toml
  vmferry guest ps
  vmferry guest console web1 --attach
  vmferry guest stop web1

\b
An embedded guest:             A QEMU guest (docs/qemu.md has every key):
  ram = "64MiB"                  kind = "qemu"
  cpu = "qemu64"                 machine = "pc-q35-7.2"
  pattern = "hot"                cpu = "Nehalem"
  dirty_rate = "20MiB/s"         vcpus = 2
  disk = "/srv/guests/w.img"     memory = "2GiB"
                                 [[disks]]
                                 path = "/srv/guests/web1.qcow2"
                                 format = "qcow2"
"""
)
def guest() -> None:
    """Start and stop guests of this host."""


@guest.command(
    epilog="""\
\b
Examples:
  vmferry guest start web1.toml
  vmferry guest start web1.toml --config /etc/vmferry/agent.toml --json
"""
)
@click.argument("spec", type=click.Path(path_type=Path))
@_dir_option
@_config_option
@json_option
def start(spec: Path, guests_dir: Path | None, config: Path | None, as_json: bool) -> None:
    """Start the guest that SPEC.toml describes; it lives on when this command ends."""
    hypervisors = _hypervisors(guests_dir, config)
    kind = _kind_of(spec)
    if kind not in hypervisors:
        raise ConfigInvalid(
            config or DEFAULT_CONFIG,
            (
                f"has no [guests.{kind}]: {spec} describes a guest of that kind; name the configuration by --config",
            ),
        )
    hypervisor = hypervisors[kind]

    async def launch() -> LocalGuest:
        return await hypervisor.start(spec)

    started = call(launch)
    if as_json:
        print_json({"guest_id": started.guest_id, "name": started.name, "pid": started.pid})
    else:
        click.echo(f"{started.name} runs: {started.guest_id}")


@guest.command(
    epilog="""\
\b
Examples:
  vmferry guest ps
  vmferry guest ps --dir /tmp/guests --json | jq '.[] | .ticks'
"""
)
@_dir_option
@_config_option
@json_option
def ps(guests_dir: Path | None, config: Path | None, as_json: bool) -> None:
    """List the guests of this host; of embedded ones also what they count, and the errors they found."""
    hypervisors = _hypervisors(guests_dir, config)
    found = call(lambda: _all_guests(hypervisors))
    if as_json:
        print_json([_json_of(one) for one in found])
        return
    rows = [
        (
            one.name,
            one.details.get("fault") or one.state,
            approx_size(one.ram_bytes),
            one.cpu_model,
            one.details.get("ticks", "-"),
            one.details.get("pages_written", "-"),
            one.details.get("errors", "-"),
            one.kind,
            one.pid,
            one.guest_id,
        )
        for one in found
    ]
    columns = ["GUEST", "STATE", ">RAM", "CPU", ">TICKS", ">PAGES WRITTEN", ">ERRORS", "KIND", ">PID", "ID"]
    places = " or ".join(str(hypervisor.place) for hypervisor in hypervisors.values())
    print_table(columns, rows, empty=f"no guests in {places}")


@guest.command(
    epilog="""\
\b
Examples:
  vmferry guest stop web1
  vmferry guest stop web1 --now
"""
)
@click.argument("name", metavar="GUEST")
@_dir_option
@_config_option
@click.option("--now", is_flag=True, help="End it at once: what it has not written is lost.")
@click.option(
    "--timeout", type=DURATION, default="60s", show_default=True, help="For its operating system to end."
)
@json_option
def stop(
    name: str, guests_dir: Path | None, config: Path | None, now: bool, timeout: float, as_json: bool
) -> None:
    """End GUEST, a name or an identity. A QEMU guest is asked by its power button, an embedded one just ends."""
    hypervisors = _hypervisors(guests_dir, config)

    async def end() -> LocalGuest:
        hypervisor, found = await _find(hypervisors, name)
        await hypervisor.stop(found, now=now, timeout_s=timeout)
        return found

    ended = call(end)
    if as_json:
        print_json({"guest_id": ended.guest_id, "name": ended.name})
    else:
        click.echo(f"{ended.name} has ended")


@guest.command(
    epilog="""\
\b
Examples:
  vmferry guest console web1
  vmferry guest console web1 --attach
"""
)
@click.argument("name", metavar="GUEST")
@_dir_option
@_config_option
@click.option("--attach", is_flag=True, help="Be at its serial port, until Ctrl-] is pressed.")
@json_option
def console(name: str, guests_dir: Path | None, config: Path | None, attach: bool, as_json: bool) -> None:
    """Print the last lines that GUEST wrote to its console, or be attached to it."""
    hypervisors = _hypervisors(guests_dir, config)

    async def read() -> tuple[LocalGuest, str, Path | None]:
        hypervisor, found = await _find(hypervisors, name)
        return found, await hypervisor.console_text(found), hypervisor.console_socket(found)

    found, text, socket = call(read)
    if attach:
        from agents.cli.terminal import attach_to

        if socket is None:
            raise click.UsageError(f"{found.name} has no console that a person could be attached to")
        click.echo(f"at the console of {found.name}; Ctrl-] leaves it", err=True)
        call(lambda: attach_to(socket))
        return
    if as_json:
        print_json({"guest_id": found.guest_id, "name": found.name, "console": text})
        return
    for line in text.splitlines():
        click.echo(escaped(line))


def _json_of(one: LocalGuest) -> dict[str, object]:
    return {
        "guest_id": one.guest_id,
        "name": one.name,
        "kind": one.kind,
        "state": one.state,
        "pid": one.pid,
        "ram_bytes": one.ram_bytes,
        "cpu_model": one.cpu_model,
        **one.details,
    }


def _hypervisors(guests_dir: Path | None, config: Path | None) -> dict[str, LocalHypervisor]:
    """Give the kinds of guests that this host has: as its agent's configuration says, where there is one.

    Raises:
        ConfigInvalid: the one that was named has mistakes.
    """
    from agents.config import load_settings
    from agents.hypervisors.embedded.local import LocalEmbedded
    from agents.hypervisors.qemu.allowed import qemu_host
    from agents.hypervisors.qemu.local import LocalQemu

    hypervisors: dict[str, LocalHypervisor] = {}
    # A directory that was named is the whole question.
    if config is None and (guests_dir is not None or not DEFAULT_CONFIG.exists()):
        return {"embedded": LocalEmbedded(guests_dir or DEFAULT_DIR)}
    settings = load_settings(config or DEFAULT_CONFIG)
    if settings.embedded is not None or guests_dir is not None:
        place = guests_dir or (settings.embedded.dir if settings.embedded else DEFAULT_DIR)
        hypervisors["embedded"] = LocalEmbedded(place)
    if settings.qemu is not None:
        hypervisors["qemu"] = LocalQemu(
            qemu_host(settings.qemu, settings.shared_dirs, settings.shared_devices, settings.network_disks)
        )
    return hypervisors


def _kind_of(spec: Path) -> str:
    """Read `kind` of a description; whatever else is wrong with the file is for its reader to say."""
    try:
        kind = tomllib.loads(spec.read_text(encoding="utf-8")).get("kind", "embedded")
    except (OSError, ValueError):
        return "embedded"
    if kind not in KINDS:
        raise click.BadParameter(f"kind = {kind!r} is not one of {', '.join(KINDS)}", param_hint="SPEC")
    return str(kind)


async def _all_guests(hypervisors: dict[str, LocalHypervisor]) -> list[LocalGuest]:
    found: list[LocalGuest] = []
    for hypervisor in hypervisors.values():
        found += await hypervisor.guests()
    return found


async def _find(hypervisors: dict[str, LocalHypervisor], wanted: str) -> tuple[LocalHypervisor, LocalGuest]:
    """Find one guest, by identity or name. Raises NotFound, Ambiguous."""
    found = [one for one in await _all_guests(hypervisors) if wanted in (one.guest_id, one.name)]
    if not found:
        raise NotFound("guest", wanted, tuple(str(one.place) for one in hypervisors.values()), {})
    if len(found) > 1:
        phrases = tuple(f"{one.guest_id} ({one.name}, {one.state})" for one in found)
        raise Ambiguous("guest", wanted, phrases, {})
    return hypervisors[found[0].kind], found[0]
