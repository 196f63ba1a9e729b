from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from agents.cli.progress import (
    LiveDisplay,
    PlainDisplay,
    SilentDisplay,
    figures,
    open_display,
    round_line,
)
from migrate.phases import Phase
from migrate.stats import Progress
from tests.agents.scripted_agent import ROUNDS, view


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_live_display_a_pipe_lines_and_a_program_nothing() -> None:
    assert isinstance(open_display(Terminal(), as_json=False), LiveDisplay)
    assert isinstance(open_display(io.StringIO(), as_json=False), PlainDisplay)
    assert isinstance(open_display(Terminal(), as_json=True), SilentDisplay)


def test_the_figures_of_a_running_move_read_like_this() -> None:
    assert figures(view()) == [
        ("phase", "pre-copy, the guest runs; round 1"),
        ("pages", "300 to send, 512 dirty when last looked"),
        ("link", "118 MB/s, 20.0 MiB so far"),
        ("guest", "writes 640 pages/s (2.62 MB/s)"),
        ("downtime", "31.0 ms, predicted"),
        ("because", "the first page was sent"),
    ]


def test_broken_links_and_a_pause_are_shown() -> None:
    broken = replace(
        view(), is_paused=True, progress=Progress(phase=Phase.PRECOPY, link_breaks=2, resent_bytes=3 << 20)
    )
    rows = dict(figures(broken))
    assert rows["phase"] == "paused, the guest runs; round 0"
    assert rows["link"] == "0 B/s, 0 B so far; broke 2x, 3.00 MiB sent again"
    assert rows["downtime"] == "not yet known"


def test_the_planners_reason_stands_only_while_pages_are_copied() -> None:
    copying = replace(view(), progress=replace(view().progress, because="20 dirty pages are few"))
    assert dict(figures(copying))["because"] == "20 dirty pages are few"
    assert dict(figures(replace(copying, phase=Phase.STOP)))["because"] == "the first page was sent"


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_the_same_rows(phase: Phase) -> None:
    assert [name for name, _ in figures(view(phase))] == [name for name, _ in figures(view())]


def test_plain_lines_tell_each_round_and_each_change_once() -> None:
    stream = io.StringIO()
    with PlainDisplay(stream) as display:
        for one in (
            view(Phase.SETUP, rounds=()),
            view(rounds=()),
            view(),
            view(),
            replace(view(), is_paused=True),
            replace(view(), progress=Progress(phase=Phase.PRECOPY, link_breaks=1, resent_bytes=1 << 20)),
            view(Phase.STOP, rounds=ROUNDS),
            view(Phase.COMPLETE, rounds=ROUNDS, has_ended=True),
        ):
            display.show(one)
    assert stream.getvalue().splitlines() == [
        "setup: the first page was sent",
        "precopy: the first page was sent",
        round_line(ROUNDS[0]),
        "paused",
        "the link broke, 1 in all; 1.00 MiB sent again",
        "resumed",
        round_line(ROUNDS[1]),
        "stop: the first page was sent",
        "complete: the first page was sent",
    ]


def test_a_round_reads_like_this() -> None:
    assert round_line(ROUNDS[0]) == (
        "round 0: 16384 pages in 800 ms, 20.0 MiB on the wire; 512 dirty again (640/s); "
        "downtime 31.0 ms predicted: a round of 26 ms would leave about 17 of 512 dirty pages"
    )


def test_a_live_display_draws_the_figures_and_then_goes() -> None:
    terminal = Terminal()
    with LiveDisplay(terminal) as display:
        display.show(view())
        drawn = terminal.getvalue()
        display.say("cancelling")
    assert "vm1: host-a to host-b" in drawn
    assert "118 MB/s" in drawn
    assert "cancelling" in terminal.getvalue()
    # The last thing that is written takes the lines away and shows the cursor again.
    assert re.search("\x1b\\[2K\\Z|\x1b\\[\\?25h.*\\Z", terminal.getvalue(), re.DOTALL)


def test_the_bar_has_a_line_of_its_own() -> None:
    terminal = Terminal()
    with LiveDisplay(terminal) as display:
        display.show(view())
    assert re.search("^(\\[[0-9;]*m)*phase", terminal.getvalue(), re.MULTILINE)


def test_before_the_first_round_has_ended_nothing_is_said_of_the_guest_s_writes() -> None:
    first = replace(view(), progress=Progress(phase=Phase.PRECOPY, remaining_pages=9))
    rows = dict(figures(first))
    assert rows["pages"] == "9 to send"
    assert rows["guest"] == "not yet known"


def test_text_of_guests_never_drives_the_terminal() -> None:
    hostile = replace(view(), guest_name="\x1b[2Jvm", because="\x1b]0;x\x07", phase=Phase.SETUP)
    for display in (PlainDisplay(stream := io.StringIO()), LiveDisplay(terminal := Terminal())):
        with display:
            display.show(hostile)
            display.say("\x1b[2J")
    assert "\x1b" not in stream.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\x07" not in terminal.getvalue()


def test_a_silent_display_is_silent() -> None:
    with SilentDisplay() as display:
        display.show(view())
        display.say("x")
