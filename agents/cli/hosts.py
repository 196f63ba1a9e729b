"""`vmferry hosts` and `vmferry guests`: what is where.

Law: asks every agent side by side, shows what was answered, names who did not answer, and then exits with 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from agents.cli import options
from agents.cli.options import config_option
from agents.cli.output import Exit, escaped, json_option, print_json, print_table
from agents.units import approx_size

__all__ = ["guests", "hosts", "name_silent"]


@click.command(
    epilog="""\
\b
Examples:
  vmferry hosts
  vmferry hosts --json | jq '.hosts[] | select(.is_draining | not) | .name'
"""
)
@config_option
@json_option
def hosts(config: Path | None, as_json: bool) -> int:
    """List all hosts: their guests, free memory, and migrations under way.

    Exits with 3 when an agent does not answer.
    """
    fleet = options.open_fleet(config)
    views, unreachable = options.call(fleet.hosts)
    if as_json:
        print_json({"hosts": views.values(), "unreachable": unreachable})
    else:
        rows = [
            (
                view.name,
                "draining" if view.is_draining else "up",
                view.guests,
                approx_size(view.free_memory_bytes),
                f"{view.outgoing}/{view.outgoing_limit}",
                f"{view.incoming}/{view.incoming_limit}",
                " ".join(view.hypervisors) or "-",
                " ".join(view.peers) or "-",
                view.version,
            )
            for view in views.values()
        ]
        columns = ["HOST", "STATE", ">GUESTS", ">FREE", ">OUT", ">IN", "HYPERVISORS", "MOVES TO", "VERSION"]
        print_table(columns, rows, empty="no agent answered")
        name_silent(unreachable)
    return Exit.UNREACHABLE if unreachable else Exit.OK


@click.command(
    epilog="""\
\b
Examples:
  vmferry guests
  vmferry guests --json | jq -r '.guests[] | select(.host == "host-a") | .guest_id'
"""
)
@config_option
@json_option
def guests(config: Path | None, as_json: bool) -> int:
    """List all guests and the hosts they are on.

    Exits with 3 when an agent does not answer: its guests are missing then.
    """
    fleet = options.open_fleet(config)
    lists, unreachable = options.call(fleet.guests)
    found = [(host, guest) for host, answer in lists.items() for guest in answer.guests]
    if as_json:
        listed = [
            {
                "name": guest.name,
                "guest_id": guest.guest_id,
                "host": host,
                "is_running": guest.is_running,
                "ram_bytes": guest.ram_bytes,
                "hypervisor": guest.hypervisor,
                "cpu_model": guest.cpu.model,
                "disks": guest.disks,
            }
            for host, guest in found
        ]
        print_json({"guests": listed, "unreachable": unreachable})
    else:
        rows = [
            (
                guest.name,
                host,
                "running" if guest.is_running else "paused",
                approx_size(guest.ram_bytes),
                guest.cpu.model,
                len(guest.disks),
                guest.hypervisor,
                guest.guest_id,
            )
            for host, guest in found
        ]
        columns = ["GUEST", "HOST", "STATE", ">RAM", "CPU", ">DISKS", "HYPERVISOR", "ID"]
        print_table(columns, rows, empty="no guests")
        name_silent(unreachable)
    return Exit.UNREACHABLE if unreachable else Exit.OK


def name_silent(unreachable: Mapping[str, str]) -> None:
    """Say on stderr which hosts did not answer, and why."""
    for host, reason in unreachable.items():
        click.echo(escaped(f"error: {host} did not answer: {reason}"), err=True)
