"""How a running move is shown: a live display on a terminal, lines elsewhere, nothing for programs.

Law: writes to one stream, stderr, so that stdout has results alone. Draws when it is told something; no thread, no
timer, no clock. Text of guests and agents is escaped.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final, Protocol, Self, TextIO

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agents.api import JobView
from agents.cli.output import escaped
from agents.units import approx_duration, approx_rate, approx_size
from memory.layout import PAGE_BYTES
from migrate.phases import Phase
from migrate.stats import RoundStats

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "SilentDisplay", "figures", "open_display", "round_line"]

_PHASES: Final = {
    Phase.SETUP: "setting up",
    Phase.PREFLIGHT: "preflight",
    Phase.PRECOPY: "pre-copy, the guest runs",
    Phase.STOP: "stopped for the last pages",
    Phase.SWITCHOVER: "switching over",
    Phase.COMPLETE: "complete",
    Phase.ROLLED_BACK: "rolled back",
    Phase.IN_DOUBT: "in doubt",
}

_UNKNOWN: Final = "not yet known"


class Display(Protocol):
    """Shows one job. Use as `with`."""

    def show(self, view: JobView) -> None:
        """Show this view from now on."""
        ...

    def say(self, sentence: str) -> None:
        """Add a sentence that stays."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def open_display(stream: TextIO, *, as_json: bool) -> Display:
    """Choose how to show a move on `stream`."""
    if as_json:
        return SilentDisplay()
    return LiveDisplay(stream) if stream.isatty() else PlainDisplay(stream)


def figures(view: JobView) -> list[tuple[str, str]]:
    """Give what a person watches, as (name, text) rows: always the same rows, so that nothing jumps."""
    progress = view.progress
    phase = "paused, the guest runs" if view.is_paused else _PHASES[view.phase]
    if view.phase is Phase.PRECOPY:
        phase = f"{phase}; round {progress.round_number}"
    # The planner's last word stands while pages are copied; after that the change of phase says more.
    is_copying = view.phase is Phase.PRECOPY and progress.because
    because = progress.because if is_copying else view.because
    pages, writes, downtime = f"{progress.remaining_pages} to send", _UNKNOWN, _UNKNOWN
    # Before the end of the first round nobody has looked what the guest writes.
    if progress.round_number:
        pages = f"{pages}, {progress.dirty_pages} dirty when last looked"
        written = approx_rate(progress.dirty_rate_pages_per_s * PAGE_BYTES)
        writes = f"writes {progress.dirty_rate_pages_per_s:.0f} pages/s ({written})"
    if progress.predicted_downtime_s:
        downtime = f"{approx_duration(progress.predicted_downtime_s)}, predicted"
    breaks = ""
    if progress.link_breaks:
        breaks = f"; broke {progress.link_breaks}x, {approx_size(progress.resent_bytes)} sent again"
    return [
        ("phase", phase),
        ("pages", pages),
        (
            "link",
            f"{approx_rate(progress.wire_rate_bytes_per_s)}, {approx_size(progress.wire_bytes)} so far{breaks}",
        ),
        ("guest", writes),
        ("downtime", downtime),
        ("because", escaped(because)),
    ]


def round_line(one: RoundStats) -> str:
    """Give one round as a line."""
    line = (
        f"round {one.number}: {one.sent_pages} pages in {approx_duration(one.duration_s)}, "
        f"{approx_size(one.wire_bytes)} on the wire; {one.dirty_pages} dirty again "
        f"({one.dirty_rate_pages_per_s:.0f}/s); downtime {approx_duration(one.predicted_downtime_s)} predicted"
    )
    return f"{line}: {escaped(one.because)}" if one.because else line


class SilentDisplay:
    """Shows nothing: for programs."""

    def show(self, view: JobView) -> None:
        pass

    def say(self, sentence: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class PlainDisplay:
    """One line for each change of phase, each round, each break of the link: for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase: Phase | None = None
        self._is_paused = False
        self._last_round = -1  # rounds count from 0
        self._link_breaks = 0

    def show(self, view: JobView) -> None:
        # A view comes with all its rounds, of which several may be new; older ones may have been left out.
        for one in view.rounds:
            if one.number > self._last_round:
                self._last_round = one.number
                self.say(round_line(one))
        if view.progress.link_breaks > self._link_breaks:
            self._link_breaks = view.progress.link_breaks
            self.say(
                f"the link broke, {self._link_breaks} in all; {approx_size(view.progress.resent_bytes)} sent again"
            )
        if view.is_paused != self._is_paused:
            self._is_paused = view.is_paused
            self.say("paused" if view.is_paused else "resumed")
        if view.phase is not self._phase:
            self._phase = view.phase
            self.say(f"{view.phase}: {view.because}" if view.because else str(view.phase))

    def say(self, sentence: str) -> None:
        click.echo(escaped(sentence), file=self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.flush()


class LiveDisplay:
    """A few lines on a terminal that are drawn anew at each view, and go when the job has ended."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._round = -1  # rounds count from 0
        self._round_pages = 0

    def show(self, view: JobView) -> None:
        progress = view.progress
        if progress.round_number != self._round:
            self._round = progress.round_number
            self._round_pages = 0
        # A round's work is not told; the most that was left of it is where it began, or near.
        self._round_pages = max(self._round_pages, progress.remaining_pages)
        # In a grid, because a bar alone does not end its line.
        bar = Table.grid()
        bar.add_row(
            ProgressBar(
                total=max(self._round_pages, 1),
                completed=self._round_pages - progress.remaining_pages,
                width=50,
            )
        )
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, text in figures(view):
            table.add_row(Text(name, style="bold"), Text(text, overflow="ellipsis", no_wrap=True))
        title = escaped(f"{view.guest_name}: {view.source} to {view.destination}")
        self._live.update(Group(Text(title, style="bold"), bar, table), refresh=True)

    def say(self, sentence: str) -> None:
        self._live.console.print(Text(escaped(sentence)))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()
