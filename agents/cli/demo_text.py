"""What the demo shows: its steps while it is played, then the figures with what they mean, and the proof.

Law: nothing is decided here. Steps draw when they are told something; no thread, no timer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Final, Protocol, Self, TextIO

import click
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from agents.api import JobView
from agents.cli.output import escaped
from agents.cli.progress import Display, open_display
from agents.cli.summary import report_json, summary_rows
from agents.demo.guests import Look
from agents.demo.proof import Claim
from agents.demo.run import Outcome
from agents.units import approx_duration

__all__ = ["Steps", "open_steps", "outcome_json", "print_outcome"]

# A pipe has no width; this is wider than any row.
_PIPE_COLUMNS: Final = 400

# In few words each, so that figure and meaning stand on one line of a terminal of 80 columns.
_MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "total": "until it ran on the other host",
        "downtime": "the guest stood still; of this:",
        "pause": "its CPU came to a stop",
        "last pages": "what it wrote last was sent",
        "device state": "then its registers were saved",
        "load": "digests compared, state loaded",
        "resume": "ownership taken, guest started",
        "guest RAM": "all of it, holes included",
        "on the wire": "sealed, everything included",
        "zero pages": "only their numbers travel",
        "raw pages": "sent as they are",
        "zstd pages": "sent compressed",
        "delta pages": "sent as what had changed in them",
        "link broke": "each of its connections counts",
        "link cut": "by the demo, amid a page",
        "dirty log": "how its writes are seen",
    }
)

_CLAIMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ram_equal": "same RAM",
        "guest_went_on": "it went on",
        "equals_unmoved_run": "as if never moved",
    }
)


class Steps(Protocol):
    """An `agents.demo.run.Show` to be used as `with`."""

    def begins(self, sentence: str) -> None: ...
    def done(self, sentence: str) -> None: ...
    def moving(self, view: JobView) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def open_steps(stream: TextIO, *, as_json: bool) -> Steps:
    """Choose how to show the steps; programs that ask for JSON see them only on a terminal."""
    if stream.isatty():
        return LiveSteps(stream)
    return PlainSteps(stream, is_silent=as_json)


class PlainSteps:
    """A line for each step that is done, and those of the move between them."""

    def __init__(self, stream: TextIO, *, is_silent: bool) -> None:
        self._stream = stream
        self._is_silent = is_silent
        self._display = open_display(stream, as_json=is_silent)

    def begins(self, sentence: str) -> None:
        pass

    def done(self, sentence: str) -> None:
        if not self._is_silent:
            click.echo(escaped(sentence), file=self._stream)

    def moving(self, view: JobView) -> None:
        self._display.show(view)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.flush()


class LiveSteps:
    """One line for each step, drawn anew until the step is done; during the move the live display is below it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._display: Display | None = None
        self._began_s = time.monotonic()
        self._is_under_way = False
        self._done_mark, self._going_mark = ("✓", "…") if _speaks_unicode(stream) else ("+", "-")

    def begins(self, sentence: str) -> None:
        self._end_display()
        if not self._is_under_way:
            self._is_under_way = True
            self._began_s = time.monotonic()
        line = Text(f"{self._going_mark} {escaped(sentence)}", style="dim")
        line.truncate(max(self._console.width - 1, 1), overflow="ellipsis")
        self._clear_line()
        self._console.print(line, end="")

    def done(self, sentence: str) -> None:
        self._end_display()
        self._clear_line()
        self._is_under_way = False
        took = approx_duration(time.monotonic() - self._began_s)
        grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
        grid.add_column(width=1)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_row(Text(self._done_mark, style="green"), Text(escaped(sentence)), Text(took, style="dim"))
        self._console.print(grid)

    def moving(self, view: JobView) -> None:
        if self._display is None:
            self._clear_line()
            self._display = open_display(self._stream, as_json=False)
            self._display.__enter__()
        self._display.show(view)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_display()
        if self._is_under_way:
            self._clear_line()

    def _end_display(self) -> None:
        if self._display is not None:
            self._display.__exit__(None, None, None)
            self._display = None

    def _clear_line(self) -> None:
        self._stream.write("\r\x1b[K")
        self._stream.flush()


def outcome_json(outcome: Outcome, guest: str) -> dict[str, object]:
    """Give the demo's JSON object: a move's, with the proof. Keys may be added, never changed."""
    report, evidence = report_json(outcome.report), outcome.evidence
    return {
        **report,
        "guest": guest,
        "guest_name": report["guest"],
        "proof": {
            "equals_unmoved_run": None,
            **{claim.name: claim.holds for claim in outcome.proof.claims},
        },
        "proof_holds": outcome.proof.holds,
        "because": {claim.name: claim.sentence for claim in outcome.proof.claims},
        "link_cuts": outcome.cuts,
        "is_offline": outcome.demo.is_offline,
        "counters": {
            "before": _counters(evidence.at_source),
            "after": _counters(evidence.later),
            "errors": evidence.later.errors,
        },
        "unmoved_run_s": evidence.unmoved_s,
        "folder": outcome.folder,
    }


def _counters(look: Look) -> dict[str, int]:
    return {"ticks": look.ticks, look.work_unit.replace(" ", "_"): look.work}


def print_outcome(outcome: Outcome, stream: TextIO) -> None:
    """Print the figures, each with what it means, and the proof."""
    is_terminal = stream.isatty()
    console = Console(
        file=stream,
        width=None if is_terminal else _PIPE_COLUMNS,
        no_color="NO_COLOR" in os.environ or not is_terminal,
        highlight=False,
        markup=False,
        emoji=False,
    )
    figures = Table.grid(padding=(0, 2, 0, 0))
    figures.add_column(no_wrap=True, style="bold")
    figures.add_column(min_width=24)
    figures.add_column(style="dim")
    for name, text in _rows(outcome):
        figures.add_row(name, Text(escaped(text)), _MEANINGS.get(name.strip(), ""))
    claims = Table.grid(padding=(0, 2, 0, 0))
    claims.add_column(no_wrap=True, style="bold")
    claims.add_column(no_wrap=True)
    claims.add_column()
    for claim in outcome.proof.claims:
        claims.add_row(_CLAIMS[claim.name], _verdict(claim), Text(escaped(claim.sentence)))
    parts: list[RenderableType] = [Text("proof", style="bold"), Padding(claims, (0, 0, 0, 2)), Text()]
    if outcome.folder is not None:
        parts.append(Text(f"configurations and logs are in {outcome.folder}"))
    if is_terminal:
        console.print()  # between the steps and the figures
    with console.capture() as printed:
        console.print(Group(figures, Text(), *parts, _conclusion(outcome)))
    # Tables fill their last column with spaces, which are nothing to a pipe.
    lines = printed.get().splitlines()
    click.echo(
        "\n".join(lines if is_terminal else [line.rstrip() for line in lines]), file=stream, color=True
    )


def _rows(outcome: Outcome) -> list[tuple[str, str]]:
    # How it ended was said by the last steps, and the proof is the demo's own, with more in it.
    rows = [(name, text) for name, text in summary_rows(outcome.report) if name not in ("ended", "proof")]
    if outcome.demo.link_cuts:
        rows.append(("link cut", f"{outcome.cuts} of {outcome.demo.link_cuts} times"))
    return rows


def _verdict(claim: Claim) -> Text:
    return Text("holds", style="green") if claim.holds else Text("FAILED", style="bold red")


def _conclusion(outcome: Outcome) -> Text:
    if not outcome.proof.holds:
        failed = ", ".join(_CLAIMS[name] for name in outcome.proof.failed)
        return Text(f"proof FAILED: {failed}", style="bold red")
    if not outcome.were_cuts_made:
        return Text(
            f"proof holds, but the link was cut {outcome.cuts} times (and noticed "
            f"{outcome.report.link_breaks} times) instead of {outcome.demo.link_cuts}: "
            "use more --ram or less --link-rate",
            style="bold yellow",
        )
    return Text("proof holds", style="bold green")


def _speaks_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")
