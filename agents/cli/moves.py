"""`vmferry move`, and how a job is followed to its end.

Law: a move lives in its agent; what happens here to the terminal or this process ends it only by asking the agent.

Tasks of `follow_job`: one follows the job, one hears Ctrl-C, one asks the agent to cancel; all end with the job,
or at the second Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterable
from dataclasses import dataclass
from pathlib import Path

import anyio
import click

from agents.api import JobView, Move
from agents.cli import options
from agents.cli.options import DURATION, HOST, RATE, config_option
from agents.cli.output import Exit, escaped, json_option, print_error, print_json
from agents.cli.progress import Display, open_display
from agents.cli.summary import report_json, summarize
from agents.client import Fleet, report_of, report_or_raise, where_it_runs
from agents.errors import AgentError, RequestRefused
from migrate.compression import Compression
from migrate.errors import MigrationError
from migrate.phases import Phase
from migrate.plan import OnTimeout
from transport.errors import TransportError

__all__ = ["Ending", "conclude", "follow_job", "move"]


@click.command(
    epilog="""\
\b
Examples:
  vmferry move web1 --to host-b
  vmferry move web1 --to host-b --downtime-limit 50ms --bandwidth 1Gbit/s
  vmferry move db1 --to host-b --timeout 5m --on-timeout suspend
  vmferry move build7 --to host-c --offline --json
  job=$(vmferry move web1 --to host-b --detach); vmferry watch "$job"

Ctrl-C cancels the move: the guest stays where it is. A second Ctrl-C only stops watching.
"""
)
@click.argument("guest")
@click.option("--to", required=True, type=HOST, help="The host to move it to.")
@click.option("--offline", "is_offline", is_flag=True, help="Stop the guest first, then copy it.")
@click.option("--downtime-limit", "downtime_limit_s", type=DURATION, help="Longest stop, for example 300ms.")
@click.option(
    "--bandwidth",
    "bandwidth_bytes_per_s",
    type=RATE,
    help="Cap, for example 1Gbit/s or 100MB/s; a plain number is MiB/s, 0 is no cap.",
)
@click.option("--timeout", "timeout_s", type=DURATION, help="Longest move, for example 5m; 0 is no limit.")
@click.option(
    "--on-timeout",
    type=click.Choice([one.value for one in OnTimeout]),
    help="Then roll back, or stop the guest and copy the rest.",
)
@click.option("--compression", type=click.Choice([one.value for one in Compression]), help="Of pages.")
@click.option("--no-audit", is_flag=True, help="Do not read all RAM once more at the source as proof.")
@click.option("--detach", is_flag=True, help="Print the job and leave it to the agent.")
@config_option
@json_option
def move(
    guest: str,
    to: str,
    is_offline: bool,
    downtime_limit_s: float | None,
    bandwidth_bytes_per_s: int | None,
    timeout_s: float | None,
    on_timeout: str | None,
    compression: str | None,
    no_audit: bool,
    detach: bool,
    config: Path | None,
    as_json: bool,
) -> int:
    """Move GUEST, a name or an identity, to another host while it runs.

    It is found wherever it is. What is not given is as the source's agent is configured.
    """
    fleet = options.open_fleet(config)

    async def start_and_follow() -> int:
        found = await fleet.locate_guest(guest)
        order = Move(
            guest=found.guest_id,
            to=to,
            is_offline=is_offline,
            downtime_limit_s=downtime_limit_s,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            timeout_s=timeout_s,
            on_timeout=None if on_timeout is None else OnTimeout(on_timeout),
            compression=None if compression is None else Compression(compression),
            audit=not no_audit,
        )
        # From before the start on, so that no Ctrl-C can leave a job behind that nobody was told of.
        with anyio.open_signal_receiver(signal.SIGINT) as presses:
            job = await fleet.start(found.host, order)
            if detach:
                if as_json:
                    print_json({"job": job, "source": found.host, "destination": to})
                else:
                    click.echo(job)
                return Exit.OK
            with open_display(sys.stderr, as_json=as_json) as display:
                ending = await follow_job(fleet, found.host, job, display, presses)
        return conclude(ending, as_json=as_json)

    return options.call(start_and_follow)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the following of a job ended. No `view`: it was left to the agent. `was_cancelled`: by us, in time."""

    job: str
    view: JobView | None
    was_cancelled: bool


async def follow_job(
    fleet: Fleet, host: str, job: str, display: Display, presses: AsyncIterable[object]
) -> Ending:
    """Follow a job to its end. The first of `presses` cancels it, the second leaves it to the agent.

    Raises:
        PeerGone, RequestRefused: in a group; as `Fleet.watch`.
    """
    end: JobView | None = None
    was_cancelled = False

    async def cancel() -> None:
        nonlocal was_cancelled
        display.say(f"cancelling job {job}; Ctrl-C again leaves it to the agent")
        try:
            await fleet.cancel(host, job)
            was_cancelled = True
        except RequestRefused as exc:
            display.say(f"too late to cancel: {exc.text}. Following the guest to where it goes")
        except (AgentError, TransportError) as exc:
            display.say(f"{host} could not be asked to cancel: {exc}. Still following")

    async def hear() -> None:
        count = 0
        async for _ in presses:
            count += 1
            if count > 1:
                tasks.cancel_scope.cancel()
                return
            tasks.start_soon(cancel)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hear)
        end = await fleet.follow(host, job, display.show)
        tasks.cancel_scope.cancel()
    return Ending(job=job, view=end, was_cancelled=was_cancelled)


def conclude(ending: Ending, *, as_json: bool) -> int:
    """Print how a job ended, and give the exit code."""
    view = ending.view
    if view is None:
        click.echo(
            f"job {ending.job} goes on in the agents: `vmferry watch {ending.job}` follows it, "
            f"`vmferry cancel {ending.job}` ends it",
            err=True,
        )
        return Exit.INTERRUPTED
    report = report_of(view)
    if as_json:
        print_json({"job": view.job, **report_json(report)})
    elif view.report is None:
        click.echo(escaped(where_it_runs(view)))
    else:
        for line in summarize(report):
            click.echo(escaped(line))
    try:
        report_or_raise(view)
    except MigrationError as exc:
        print_error(exc)
    match view.phase:
        case Phase.COMPLETE:
            return Exit.OK
        case Phase.ROLLED_BACK:
            return Exit.INTERRUPTED if ending.was_cancelled else Exit.REFUSED
        case _:
            return Exit.IN_DOUBT
