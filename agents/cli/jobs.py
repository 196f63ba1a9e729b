"""`vmferry jobs, watch, set, pause, resume, cancel, resolve`: moves that run in the agents.

Law: a job is named by its id or its first letters. The source's agent is asked, the destination's only where the
source does not answer.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Final

import click

from agents.api import JobView, Resolution
from agents.cli import options
from agents.cli.hosts import name_silent
from agents.cli.moves import Ending, conclude
from agents.cli.options import DURATION, RATE, config_option
from agents.cli.output import Exit, escaped, json_option, print_facts, print_json, print_table
from agents.cli.progress import open_display
from agents.client import where_it_runs
from agents.units import approx_rate
from migrate.phases import Phase

__all__ = ["cancel", "jobs", "pause", "resolve", "resume", "set_limits", "watch"]

# Of 32 hexadecimal digits; enough to tell the jobs of years apart.
_SHOWN_LETTERS: Final = 8


@click.command(
    epilog="""\
\b
Examples:
  vmferry jobs
  vmferry jobs --json | jq '.jobs[] | select(.has_ended | not) | .job'
"""
)
@config_option
@json_option
def jobs(config: Path | None, as_json: bool) -> int:
    """List moves that run and those that ended lately.

    Exits with 3 when an agent does not answer.
    """
    fleet = options.open_fleet(config)
    lists, unreachable = options.call(fleet.jobs)
    known: dict[str, JobView] = {}
    for answer in lists.values():
        for view in answer.jobs:
            # Both ends know a job; the source knows more.
            if view.job not in known or view.is_outgoing:
                known[view.job] = view
    views = sorted(known.values(), key=lambda view: view.started_at_s)
    if as_json:
        print_json({"jobs": views, "unreachable": unreachable})
    else:
        rows = [
            (
                view.job[:_SHOWN_LETTERS],
                view.guest_name,
                view.source,
                view.destination,
                "paused" if view.is_paused and not view.has_ended else view.phase,
                "-" if view.has_ended else view.progress.round_number,
                "-" if view.has_ended else view.progress.remaining_pages,
                "-" if view.has_ended else approx_rate(view.progress.wire_rate_bytes_per_s),
                f"{datetime.fromtimestamp(view.started_at_s):%m-%d %H:%M:%S}",
                view.because,
            )
            for view in views
        ]
        columns = [
            *("JOB", "GUEST", "FROM", "TO", "PHASE", ">ROUND", ">PAGES LEFT", ">LINK", "STARTED", "BECAUSE"),
        ]
        print_table(columns, rows, empty="no jobs")
        name_silent(unreachable)
    return Exit.UNREACHABLE if unreachable else Exit.OK


@click.command(
    epilog="""\
\b
Examples:
  vmferry watch 3f0f4c6e
  vmferry watch 3f0f --json

Ctrl-C stops watching; the move goes on.
"""
)
@click.argument("job")
@config_option
@json_option
def watch(job: str, config: Path | None, as_json: bool) -> int:
    """Follow JOB to its end, and print how it ended.

    Exits as `vmferry move` would: 0 complete, 1 rolled back, 4 in doubt.
    """
    fleet = options.open_fleet(config)

    async def follow() -> Ending:
        found = await fleet.find_job(job)
        with open_display(sys.stderr, as_json=as_json) as display:
            view = await fleet.follow(found.host, found.job, display.show)
        return Ending(job=found.job, view=view, was_cancelled=False)

    return conclude(options.call(follow), as_json=as_json)


@click.command(
    "set",
    epilog="""\
\b
Examples:
  vmferry set 3f0f4c6e --bandwidth 200MB/s
  vmferry set 3f0f4c6e --bandwidth 0 --downtime-limit 1s
""",
)
@click.argument("job")
@click.option("--downtime-limit", "downtime_limit_s", type=DURATION, help="Longest stop, for example 300ms.")
@click.option(
    "--bandwidth",
    "bandwidth_bytes_per_s",
    type=RATE,
    help="Cap, for example 1Gbit/s or 100MB/s; a plain number is MiB/s, 0 is no cap.",
)
@config_option
@json_option
def set_limits(
    job: str,
    downtime_limit_s: float | None,
    bandwidth_bytes_per_s: int | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Change the limits of JOB while it runs."""
    if downtime_limit_s is None and bandwidth_bytes_per_s is None:
        raise click.UsageError("nothing to change: give --bandwidth or --downtime-limit")
    fleet = options.open_fleet(config)

    async def ask() -> str:
        found = await fleet.find_job(job)
        async with fleet.connect(found.host) as agent:
            await agent.set_limits(
                found.job, downtime_limit_s=downtime_limit_s, bandwidth_bytes_per_s=bandwidth_bytes_per_s
            )
        return found.job

    _print_done(options.call(ask), "has new limits", as_json)


@click.command(
    epilog="""\
\b
Examples:
  vmferry pause 3f0f4c6e
  vmferry pause 3f0f4c6e && sleep 60 && vmferry resume 3f0f4c6e
"""
)
@click.argument("job")
@config_option
@json_option
def pause(job: str, config: Path | None, as_json: bool) -> None:
    """Hold the copying of JOB; the guest runs on."""
    fleet = options.open_fleet(config)

    async def ask() -> str:
        found = await fleet.find_job(job)
        async with fleet.connect(found.host) as agent:
            await agent.pause(found.job)
        return found.job

    _print_done(options.call(ask), "is paused; its guest runs on", as_json)


@click.command(
    epilog="""\
\b
Examples:
  vmferry resume 3f0f4c6e
"""
)
@click.argument("job")
@config_option
@json_option
def resume(job: str, config: Path | None, as_json: bool) -> None:
    """Let a paused JOB go on copying."""
    fleet = options.open_fleet(config)

    async def ask() -> str:
        found = await fleet.find_job(job)
        async with fleet.connect(found.host) as agent:
            await agent.resume(found.job)
        return found.job

    _print_done(options.call(ask), "goes on", as_json)


@click.command(
    epilog="""\
\b
Examples:
  vmferry cancel 3f0f4c6e
"""
)
@click.argument("job")
@config_option
@json_option
def cancel(job: str, config: Path | None, as_json: bool) -> int:
    """Cancel JOB, wait until it is rolled back, and say what runs where.

    Exits with 1 when it was too late, with 4 when it ended in doubt.
    """
    fleet = options.open_fleet(config)

    async def ask_and_wait() -> JobView:
        found = await fleet.find_job(job)
        await fleet.cancel(found.host, found.job)
        return await fleet.follow(found.host, found.job)

    view = options.call(ask_and_wait)
    sentence = where_it_runs(view)
    if as_json:
        print_json({"job": view.job, "phase": view.phase, "what_runs_where": sentence})
    else:
        click.echo(escaped(sentence))
    match view.phase:
        case Phase.ROLLED_BACK:
            return Exit.OK
        case Phase.COMPLETE:
            return Exit.REFUSED
        case _:
            return Exit.IN_DOUBT


@click.command(
    epilog="""\
\b
Examples:
  vmferry resolve 3f0f4c6e
  vmferry resolve 3f0f4c6e --act
  vmferry resolve 3f0f4c6e --take      # the destination is off for good, and never said that the guest runs

A job is in doubt when the last answer between the two hosts was lost: the guest may run at the destination, so it
stays stopped at the source. Who owns it is written on the shared storage.

Both agents look at the record every few seconds, and settle it by themselves when the storage and the other agent
answer. --act does that now. That can never start a second copy. What it risks: where nobody owns the guest yet, the
host that is asked takes it, and the other can never run it; where the other host owns it, the stopped copy here is
ended, and if the other has failed since, the guest runs nowhere until it is started from its disks. --take is
for a destination that took the guest, has not said that it runs, and is off: if it does run there, two copies write
to one disk. So does a guest that is started by hand.
"""
)
@click.argument("job")
@click.option("--act", is_flag=True, help="Read the ownership record and obey it.")
@click.option(
    "--take", is_flag=True, help="Let the source's stopped copy run: the destination is certainly off."
)
@config_option
@json_option
def resolve(job: str, act: bool, take: bool, config: Path | None, as_json: bool) -> int:
    """Show what is known of a JOB in doubt, and settle it with --act.

    Exits with 4 for as long as it is in doubt.
    """
    fleet = options.open_fleet(config)

    async def ask() -> tuple[str, Resolution]:
        found = await fleet.find_job(job)
        async with fleet.connect(found.host) as agent:
            return found.host, await agent.resolve(found.job, act, take)

    host, known = options.call(ask)
    if as_json:
        print_json({"asked": host, "resolution": known})
    else:
        print_facts(
            {
                "job": known.job,
                "guest": known.guest_name,
                "asked": host,
                "phase": known.phase,
                "record": known.record or "none is known",
                "verdict": known.verdict or "-",
                "runs on": known.runs_on or "nobody knows yet",
            }
        )
        if not known.is_resolved:
            click.echo(
                f"Nothing was changed. `vmferry resolve {known.job[:_SHOWN_LETTERS]} --act` reads the record and "
                "obeys it; do not start the guest by hand."
                if not (act or take)
                else "Still in doubt: see the verdict. Do not start the guest by hand."
            )
    return Exit.OK if known.is_resolved else Exit.IN_DOUBT


def _print_done(job: str, outcome: str, as_json: bool) -> None:
    if as_json:
        print_json({"job": job})
    else:
        click.echo(f"job {escaped(job[:_SHOWN_LETTERS])} {outcome}")
