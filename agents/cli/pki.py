"""`vmferry pki`: a certificate authority of one's own, for agents and operators."""

from __future__ import annotations

from pathlib import Path

import click

from agents import pki as authority
from agents.cli.output import json_option, print_facts, print_json

__all__ = ["pki"]

_folder_option = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("pki"),
    show_default=True,
    help="Folder of the CA and of everything it issues.",
)
_force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


@click.group(
    epilog="""\
\b
Examples:
  vmferry pki init
  vmferry pki issue agent host-a --address host-a.example
  vmferry pki issue operator eva
  vmferry pki show pki/agent-host-a.crt
  vmferry pki revoke operator/eva

Copy ca.crt and a host's own .crt and .key to that host. ca.key stays where it was made: whoever has it can
be every host.
"""
)
def pki() -> None:
    """Make, show and revoke the certificates of agents and operators."""


@pki.command(
    epilog="""\
\b
Examples:
  vmferry pki init
  vmferry pki init --dir /srv/pki --name "Rack 7" --days 1825
"""
)
@_folder_option
@click.option("--name", default="vmferry", show_default=True, help="Name of the CA, for people.")
@click.option("--days", type=click.IntRange(1, authority.MAX_DAYS), default=3650, show_default=True)
@_force_option
@json_option
def init(folder: Path, name: str, days: int, force: bool, as_json: bool) -> None:
    """Make a certificate authority."""
    _print_issued(authority.init_ca(folder, name, days, force=force), as_json)


@pki.command(
    epilog="""\
\b
Examples:
  vmferry pki issue agent host-a --address host-a.example --address 192.0.2.7
  vmferry pki issue operator eva --days 90 --json
"""
)
@click.argument("role", type=click.Choice([role.value for role in authority.Role]))
@click.argument("name")
@_folder_option
@click.option("--days", type=click.IntRange(1, authority.MAX_DAYS), default=365, show_default=True)
@click.option("--address", "addresses", multiple=True, help="Host name or IP address, for other tools.")
@_force_option
@json_option
def issue(
    role: str, name: str, folder: Path, days: int, addresses: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Issue a certificate for ROLE (agent or operator) NAME.

    An agent's NAME is the name of its host in the agent's configuration.
    """
    files = authority.issue(folder, authority.Role(role), name, days, addresses, force=force)
    _print_issued(files, as_json)


@pki.command(
    epilog="""\
\b
Examples:
  vmferry pki revoke agent/host-a
  vmferry pki revoke operator/eva --dir /srv/pki
  vmferry pki revoke --serial 5d1f0c
  vmferry pki revoke

Copy ca.crl to all hosts: `crl` in [tls] of an agent names it there, and the agent reads it again when it changes.
"""
)
@click.argument("names", metavar="[ROLE/NAME]...", nargs=-1)
@_folder_option
@click.option(
    "--serial",
    "serials",
    multiple=True,
    help="Serial number, in hexadecimal: for certificates without a file.",
)
@json_option
def revoke(names: tuple[str, ...], folder: Path, serials: tuple[str, ...], as_json: bool) -> None:
    """Take certificates back: add them to the CA's revocation list, ca.crl.

    ROLE/NAME means the certificate of that name in the folder, not those that it replaced. Without any, the list
    is only made, or signed anew.
    """
    from agents.revocation import CRL_NAME
    from agents.revocation import revoke as add

    made = add(folder, names, serials)
    facts = {"list": folder / CRL_NAME, "revoked": len(made.serials)}
    if as_json:
        print_json({**facts, "ends": made.ends, "serials": sorted(made.serials)})
        return
    print_facts({**facts, "valid until": f"{made.ends:%Y-%m-%d %H:%M} UTC"})


@pki.command(
    epilog="""\
\b
Examples:
  vmferry pki show pki/agent-host-a.crt
  vmferry pki show /etc/vmferry/own.crt --json | jq .days_left
"""
)
@click.argument("certificate", type=click.Path(path_type=Path))
@json_option
def show(certificate: Path, as_json: bool) -> None:
    """Show what CERTIFICATE says: whose it is, and how long it is valid."""
    facts = authority.describe(certificate)
    if as_json:
        print_json(facts)
        return
    if facts.role is not None:
        identity = f"{facts.role} {facts.name}"
    else:
        identity = "a certificate authority" if facts.is_ca else "none of vmferry's"
    left = f"{facts.days_left} days left" if facts.days_left >= 0 else "expired"
    print_facts(
        {
            "identity": identity,
            "subject": facts.subject,
            "issuer": facts.issuer,
            "addresses": " ".join(facts.addresses) or "-",
            "valid from": f"{facts.not_before:%Y-%m-%d %H:%M} UTC",
            "valid until": f"{facts.not_after:%Y-%m-%d %H:%M} UTC ({left})",
            "serial": facts.serial,
            "SHA-256": facts.fingerprint,
        }
    )


def _print_issued(files: authority.IssuedFiles, as_json: bool) -> None:
    facts = authority.describe(files.certificate)
    if as_json:
        print_json({"files": files, "facts": facts})
        return
    print_facts(
        {
            "certificate": files.certificate,
            "key": files.key,
            "valid until": f"{facts.not_after:%Y-%m-%d %H:%M} UTC",
        }
    )
