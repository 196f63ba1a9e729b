"""`vmferry guest`: embedded guests of this very host, without an agent.

Law: talks to guests' own sockets below one directory, as an agent does; no network. What a guest prints is escaped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from agents.cli.output import escaped, json_option, print_json, print_table
from agents.errors import Ambiguous, NotFound
from agents.hypervisors.embedded.client import Description, GuestClient, start_guest
from agents.hypervisors.embedded.errors import EmbeddedError, GuestGone
from agents.hypervisors.embedded.rundir import GuestPaths, clean_stale, guest_ids
from agents.hypervisors.embedded.spec import EmbeddedSpec
from agents.units import approx_size

__all__ = ["guest"]

_dir_option = click.option(
    "--dir",
    "guests_dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/run/vmferry/guests"),
    show_default=True,
    help="The agent's [guests.embedded] dir.",
)


@click.group(
    epilog="""\
\b
Examples:
  vmferry guest start web1.toml
  vmferry guest ps
  vmferry guest console web1
  vmferry guest stop web1

\b
A guest's description, web1.toml:
  ram = "64MiB"
  cpu = "qemu64"
  pattern = "hot"
  dirty_rate = "20MiB/s"
  disk = "/srv/guests/web1.img"
"""
)
def guest() -> None:
    """Start and stop embedded guests of this host."""


@guest.command(
    epilog="""\
\b
Examples:
  vmferry guest start web1.toml
  vmferry guest start web1.toml --dir /tmp/guests --json
"""
)
@click.argument("spec", type=click.Path(path_type=Path))
@_dir_option
@json_option
def start(spec: Path, guests_dir: Path, as_json: bool) -> None:
    """Start the guest that SPEC.toml describes; it lives on when this command ends."""
    described = EmbeddedSpec.from_toml(spec)
    pid = start_guest(described, guests_dir)
    if as_json:
        print_json({"guest_id": described.guest_id, "name": described.name, "pid": pid})
    else:
        click.echo(f"{described.name} runs: {described.guest_id}")


@guest.command(
    epilog="""\
\b
Examples:
  vmferry guest ps
  vmferry guest ps --dir /tmp/guests --json | jq '.[] | .ticks'
"""
)
@_dir_option
@json_option
def ps(guests_dir: Path, as_json: bool) -> None:
    """List the guests, what they count, and the errors they found in their own memory."""
    found = _describe_all(guests_dir)
    if as_json:
        print_json(
            [
                {
                    "guest_id": one.spec.guest_id,
                    "name": one.spec.name,
                    "state": one.state,
                    "fault": one.fault or None,
                    "pid": one.pid,
                    "ram_bytes": one.spec.ram_bytes,
                    "cpu_model": one.spec.cpu_model,
                    "instructions": one.instructions,
                    "ticks": one.ticks,
                    "pages_written": one.pages_written,
                    "errors": one.errors,
                }
                for one in found
            ]
        )
        return
    rows = [
        (
            one.spec.name,
            one.fault or one.state,
            approx_size(one.spec.ram_bytes),
            one.spec.cpu_model,
            one.ticks,
            one.pages_written,
            one.errors,
            one.pid,
            one.spec.guest_id,
        )
        for one in found
    ]
    columns = ["GUEST", "STATE", ">RAM", "CPU", ">TICKS", ">PAGES WRITTEN", ">ERRORS", ">PID", "ID"]
    print_table(columns, rows, empty=f"no guests in {guests_dir}")


@guest.command(
    epilog="""\
\b
Examples:
  vmferry guest stop web1
"""
)
@click.argument("name", metavar="GUEST")
@_dir_option
@json_option
def stop(name: str, guests_dir: Path, as_json: bool) -> None:
    """End GUEST, a name or an identity, at once: its RAM is gone."""
    with _opened(name, guests_dir) as (client, described):
        client.quit()
        client.await_end()
    if as_json:
        print_json({"guest_id": described.spec.guest_id, "name": described.spec.name})
    else:
        click.echo(f"{described.spec.name} has ended")


@guest.command(
    epilog="""\
\b
Examples:
  vmferry guest console web1
"""
)
@click.argument("name", metavar="GUEST")
@_dir_option
@json_option
def console(name: str, guests_dir: Path, as_json: bool) -> None:
    """Print the last lines that GUEST wrote to its console."""
    with _opened(name, guests_dir) as (_, described):
        text = described.console_tail.decode("utf-8", "replace")
    if as_json:
        print_json({"guest_id": described.spec.guest_id, "name": described.spec.name, "console": text})
        return
    for line in text.splitlines():
        click.echo(escaped(line))


def _describe_all(guests_dir: Path) -> list[Description]:
    described: list[Description] = []
    for guest_id in guest_ids(guests_dir):
        # One that ends while we look is not here.
        with contextlib.suppress(EmbeddedError), _connected(guests_dir, guest_id) as client:
            described.append(client.describe())
    return described


@contextlib.contextmanager
def _opened(wanted: str, guests_dir: Path) -> Iterator[tuple[GuestClient, Description]]:
    """Connect to one guest, by identity or name.

    Raises:
        NotFound, Ambiguous, EmbeddedError: as they say.
    """
    here = _describe_all(guests_dir)
    found = [one for one in here if wanted in (one.spec.guest_id, one.spec.name)]
    if not found:
        raise NotFound("guest", wanted, (str(guests_dir),), {})
    if len(found) > 1:
        phrases = tuple(f"{one.spec.guest_id} ({one.spec.name}, {one.state})" for one in found)
        raise Ambiguous("guest", wanted, phrases, {})
    with _connected(guests_dir, found[0].spec.guest_id) as client:
        yield client, found[0]


@contextlib.contextmanager
def _connected(guests_dir: Path, guest_id: str) -> Iterator[GuestClient]:
    paths = GuestPaths.of_guest(guests_dir.absolute(), guest_id)
    try:
        client = GuestClient(paths.socket)
    except GuestGone:
        clean_stale(paths)
        raise
    with contextlib.closing(client):
        yield client
