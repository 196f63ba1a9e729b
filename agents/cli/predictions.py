"""`vmferry predictions`: what was foretold of moves, what they took, and how good that was."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click

from agents.api import PredictionList
from agents.cli import options
from agents.cli.foretold import in_words
from agents.cli.hosts import name_silent
from agents.cli.options import HOST, config_option
from agents.cli.output import Exit, escaped, json_option, print_json, print_table
from migrate.forecast import QUANTITIES, Interval, PastMove
from migrate.lessons import Score, scores

__all__ = ["predictions"]


@click.command(
    epilog="""\
\b
Examples:
  vmferry predictions
  vmferry predictions --guest web1
  vmferry predictions --host host-a --json | jq '.scores[] | {quantity, coverage, bias, width}'
"""
)
@click.option("--host", type=HOST, help="Only of moves from this host; its agent alone is asked.")
@click.option("--guest", default="", help="Only of this guest, a name or an identity.")
@config_option
@json_option
def predictions(host: str | None, guest: str, config: Path | None, as_json: bool) -> int:
    """Show what was predicted of moves beside what they took, and how good that was.

    Coverage, the share of moves that ended within their intervals, should be near 80 %: below, intervals are too
    narrow, above, wider than they need to be. Bias is the median of what a move took over what was foretold, width the
    median of an interval's high over its low. A prediction of a check that no move followed has no outcome. Exits with
    3 when an agent does not answer.
    """
    fleet = options.open_fleet(config)

    async def ask() -> tuple[list[PredictionList], dict[str, str]]:
        if host is not None:
            async with fleet.connect(host) as agent:
                return [await agent.predictions(guest)], {}
        answers, unreachable = await fleet.predictions(guest)
        return list(answers.values()), unreachable

    lists, unreachable = options.call(ask)
    moves = sorted((one for each in lists for one in each.moves), key=lambda one: one.prediction.made_at_s)
    scored = scores(moves)
    if as_json:
        print_json({"predictions": moves, "scores": scored, "unreachable": unreachable})
    else:
        _show(moves, scored)
        name_silent(unreachable)
    return Exit.UNREACHABLE if unreachable else Exit.OK


def _show(moves: Sequence[PastMove], scored: Sequence[Score]) -> None:
    columns = [
        "MADE",
        "GUEST",
        "FROM",
        "TO",
        "BASIS",
        ">TOTAL",
        ">DOWNTIME",
        ">ON THE WIRE",
        ">AGENT CPU",
        "ENDED",
    ]
    print_table(columns, [_row(one) for one in moves], empty="no predictions")
    if not any(one.moves for one in scored):
        return
    click.echo()
    rows = [
        (
            one.quantity,
            one.moves,
            "-" if one.coverage is None else f"{100 * one.coverage:.0f} %",
            "-" if one.bias is None else f"{one.bias:.2f}",
            "-" if one.width is None else f"{one.width:.2f}",
        )
        for one in scored
    ]
    print_table(["QUANTITY", ">MOVES", ">COVERAGE", ">BIAS", ">WIDTH"], rows, empty="")
    click.echo(escaped("a cell is: what it took (low to high of the prediction; ! outside of it)"))


def _row(one: PastMove) -> tuple[str, ...]:
    made = one.prediction
    cells = [_cell(one, quantity, made.figures.of(quantity)) for quantity in QUANTITIES]
    limits = made.conditions
    return (
        f"{datetime.fromtimestamp(made.made_at_s):%m-%d %H:%M:%S}",
        limits.guest_name,
        limits.source,
        limits.destination,
        str(made.basis),
        *cells,
        "-" if one.outcome is None else str(one.outcome.phase),
    )


def _cell(one: PastMove, quantity: str, interval: Interval) -> str:
    foretold = f"({in_words(quantity, interval.low)} to {in_words(quantity, interval.high)})"
    value = one.outcome.value(quantity) if one.outcome is not None else None
    if value is None:
        return f"- {foretold}"
    return f"{in_words(quantity, value)}{'' if interval.holds(value) else '!'} {foretold}"
