"""`vmferry check`: the preflight of a move that is not made, to one host or to all.

Tasks of `--to any`: one a host, a few at once; each ends with that host's answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import click

from agents.api import CheckReport
from agents.cli import options
from agents.cli.options import HOST, config_option
from agents.cli.output import Exit, escaped, json_option, print_json, print_table
from agents.client import Fleet, FoundGuest
from agents.errors import AgentError
from migrate.errors import MigrationError
from migrate.facts import PathFacts
from migrate.preflight import Finding, PreflightReport, Severity
from transport.errors import TransportError

__all__ = ["ANY", "check"]

ANY: Final = "any"
# Each is a session of the source's agent with another host.
_ASKED_AT_ONCE: Final = 8
# What a person must see first.
_GRAVITY: Final = (Severity.REFUSED, Severity.WARNING, Severity.UNKNOWN, Severity.OK)
_STYLES: Final = {"refused": "bold red", "warning": "yellow", "unknown": "magenta", "ok": "green"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What was found for one destination, or why nothing was."""

    to: str
    findings: tuple[Finding, ...] = ()
    path: PathFacts | None = None
    error: str = ""

    @property
    def report(self) -> PreflightReport:
        return PreflightReport(findings=self.findings)

    @property
    def fits(self) -> bool:
        return not self.error and self.report.is_passed


@click.command(
    epilog="""\
\b
Examples:
  vmferry check web1 --to host-b
  vmferry check web1 --to host-b --all
  vmferry check web1 --to host-b --no-measure
  vmferry check web1 --to any
  vmferry check web1 --to host-b --json | jq '.findings[] | select(.severity == "refused")'
  vmferry check web1 --to any --json | jq -r '.hosts[] | select(.passed) | .destination'
"""
)
@click.argument("guest")
@click.option(
    "--to", required=True, type=HOST, help=f"The host that it would move to; `{ANY}`: try all of them."
)
@click.option("--all", "show_all", is_flag=True, help="Show also what is as it should be.")
@click.option(
    "--measure/--no-measure",
    "measures",
    default=None,
    help=f"Send noise to the host for a second, to see what the path carries.  [default: not with --to {ANY}]",
)
@config_option
@json_option
def check(
    guest: str, to: str, show_all: bool, measures: bool | None, config: Path | None, as_json: bool
) -> int:
    """Tell whether GUEST could move to a host: every finding, and what to do.

    Nothing is moved. Exits with 1 when anything stands against the move, with `--to any` when no host fits.
    """
    fleet = options.open_fleet(config)
    if measures is None:
        measures = to != ANY

    async def ask() -> int:
        found = await fleet.locate_guest(guest)
        if to == ANY:
            return _show_all(found, await _ask_all(fleet, found, measures=measures), as_json=as_json)
        async with fleet.connect(found.host) as agent:
            report = await agent.check(found.guest_id, to, measures=measures)
        return _show_one(found, report, show_all=show_all, as_json=as_json)

    return options.call(ask)


async def _ask_all(fleet: Fleet, found: FoundGuest, *, measures: bool) -> list[_Answer]:
    """Ask the guest's host for a preflight to each host that it knows."""
    async with fleet.connect(found.host) as agent:
        peers = (await agent.host()).peers
    answers: dict[str, _Answer] = {}
    limiter = anyio.CapacityLimiter(_ASKED_AT_ONCE)

    async def ask(to: str) -> None:
        async with limiter:
            try:
                async with fleet.connect(found.host) as agent:
                    report = await agent.check(found.guest_id, to, measures=measures)
                answers[to] = _Answer(to=to, findings=report.findings, path=report.path)
            except (AgentError, TransportError, MigrationError) as exc:
                answers[to] = _Answer(to=to, error=str(exc))

    async with anyio.create_task_group() as asking:
        for peer in peers:
            asking.start_soon(ask, peer)
    return [answers[peer] for peer in sorted(peers)]


def _show_one(found: FoundGuest, report: CheckReport, *, show_all: bool, as_json: bool) -> int:
    answer = _Answer(to=report.to, findings=report.findings, path=report.path)
    if as_json:
        print_json({**_head(found), **_facts(answer)})
    else:
        worst_first = sorted(report.findings, key=lambda one: _GRAVITY.index(one.severity))
        shown = [one for one in worst_first if show_all or one.severity is not Severity.OK]
        if shown:
            rows = [(one.check, one.severity, one.found, one.remedy or "-") for one in shown]
            print_table(["CHECK", "RESULT", "FOUND", "REMEDY"], rows, empty="", styles=_STYLES)
        if report.path is not None and (line := _path_line(report.to, report.path)):
            click.echo(escaped(line))
        for one in answer.report.of(Severity.REFUSED):
            click.echo(escaped(f"why {one.check}: {one.why}"))
        if not show_all:
            good = dict.fromkeys(one.check for one in answer.report.of(Severity.OK))
            click.echo(escaped(f"ok: {', '.join(good) or 'nothing'} (--all shows what was found)"))
        refused = len(answer.report.of(Severity.REFUSED))
        outcome = (
            f"cannot move to {report.to}: {refused} refused" if refused else f"can move to {report.to}"
        ) + _less(answer)
        click.echo(escaped(f"{found.name} on {found.host} {outcome}"))
    return Exit.OK if answer.fits else Exit.REFUSED


def _path_line(to: str, path: PathFacts) -> str:
    """Say what was found of the path, in one line; nothing where nothing was."""
    parts = []
    if path.goodput_bytes_per_s is not None:
        parts.append(
            f"{_approx_bits(path.goodput_bytes_per_s)} measured over {path.connections} connections for "
            f"{path.measured_s:.1f} s"
        )
    round_trip_s = path.rtt_s if path.rtt_s is not None else path.ping_s
    if round_trip_s is not None:
        parts.append(f"round trip {round_trip_s * 1e3:.2f} ms")
    if path.mtu_bytes is not None:
        parts.append(f"MTU {path.mtu_bytes}")
    return f"path to {to}: {', '.join(parts)}" if parts else ""


def _approx_bits(bytes_per_s: float) -> str:
    """Write a rate as links are sold; for reading only."""
    bits_per_s = bytes_per_s * 8
    for unit, factor in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_s >= factor:
            return f"{bits_per_s / factor:.3g} {unit}"
    return f"{bits_per_s:.3g} bit/s"


def _less(answer: _Answer) -> str:
    """Say what there is beside refusals."""
    counted = [
        f"{len(answer.report.of(severity))} {severity}"
        for severity in (Severity.WARNING, Severity.UNKNOWN)
        if answer.report.of(severity)
    ]
    return f" ({', '.join(counted)})" if counted else ""


def _show_all(found: FoundGuest, answers: Sequence[_Answer], *, as_json: bool) -> int:
    fitting = [answer.to for answer in answers if answer.fits]
    if as_json:
        print_json({**_head(found), "hosts": [_facts(answer) for answer in answers]})
    else:
        rows = []
        for answer in answers:
            counts = [len(answer.report.of(severity)) for severity in _GRAVITY[:3]]
            refused = answer.report.of(Severity.REFUSED)
            reasons = answer.error or "; ".join(one.found for one in refused) or "-"
            outcome = "unreachable" if answer.error else "fits" if answer.fits else "refused"
            rows.append((answer.to, outcome, *counts, reasons))
        print_table(
            ["HOST", "RESULT", ">REFUSED", ">WARNING", ">UNKNOWN", "REASONS"],
            rows,
            styles=_STYLES | {"fits": "green", "unreachable": "red"},
            empty=f"{found.host} knows no other host: its configuration has no [peers.NAME]",
        )
        where = ", ".join(fitting) if fitting else "no host"
        click.echo(escaped(f"{found.name} on {found.host} can move to {where}"))
    return Exit.OK if fitting else Exit.REFUSED


def _head(found: FoundGuest) -> dict[str, object]:
    return {"guest": found.name, "guest_id": found.guest_id, "source": found.host}


def _facts(answer: _Answer) -> dict[str, object]:
    facts: dict[str, object] = {
        "destination": answer.to,
        "passed": answer.fits,
        "findings": answer.findings,
    }
    if answer.path is not None:
        facts["path"] = answer.path
    return {**facts, "error": answer.error} if answer.error else facts
