from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from agents.cli.demo_text import LiveSteps, PlainSteps, open_steps, outcome_json, print_outcome
from agents.cli.output import to_json
from tests.agents.demo.evidence import GOOD, REPORT, STANDSTILL, outcome
from tests.agents.scripted_agent import view


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


SUMMARY = """\
total           500 ms, 1 round                      until it ran on the other host
downtime        8.10 ms                              the guest stood still; of this:
  pause         1.00 ms                              its CPU came to a stop
  last pages    2.00 ms                              what it wrote last was sent
  device state  100 us                               then its registers were saved
  load          3.00 ms                              digests compared, state loaded
  resume        2.00 ms                              ownership taken, guest started
guest RAM       8.00 MiB                             all of it, holes included
on the wire     1.00 MiB, 2.10 MB/s on average       sealed, everything included
  zero pages    3, sent as runs                      only their numbers travel
  raw pages     0 in 0 B                             sent as they are
  zstd pages    1021 in 488 KiB, 12 % of their size  sent compressed
  delta pages   300 in 4.00 KiB, 0 % of their size   sent as what had changed in them
link broke      4 times, 2.00 KiB sent again         each of its connections counts
dirty log       uffd-wp                              how its writes are seen
link cut        2 of 2 times                         by the demo, amid a page

proof
  same RAM           holds  all RAM, read again at host-a after the stop, has the digest that host-b had at the \
stop: 0101010101010101
  it went on         holds  it counted to 100 at the last look on host-a, to 180 on host-b, and its own checks of its \
memory found no error; on host-a it has ended
  as if never moved  holds  the same guest was run again from boot for 9000 instructions and not moved (250 ms): its \
RAM, registers, devices and disk are the same, to the byte

proof holds
"""


def test_the_summary_on_a_pipe_reads_like_this() -> None:
    stream = io.StringIO()
    print_outcome(outcome(), stream)
    assert stream.getvalue() == SUMMARY


def test_a_terminal_gets_no_line_that_is_wider_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    print_outcome(outcome(), terminal)
    lines = (
        terminal.getvalue().replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()
    )
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "proof holds"


def test_a_proof_that_fails_says_in_what() -> None:
    spoiled = replace(
        GOOD,
        report=replace(REPORT, source_digest=b"\x02" * 16),
        moved=replace(STANDSTILL, disk=b"x"),
    )
    stream = io.StringIO()
    print_outcome(outcome(spoiled), stream)
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "proof FAILED: same RAM, as if never moved"
    assert any(line.startswith("  same RAM           FAILED  the digest of all RAM") for line in lines)


@pytest.mark.parametrize("cuts", [0, 1])
def test_cuts_that_were_not_made_are_not_passed_over(cuts: int) -> None:
    stream = io.StringIO()
    made = outcome(cuts=cuts)
    assert not made.were_cuts_made
    print_outcome(made, stream)
    assert f"the link was cut {cuts} times (and noticed 4 times) instead of 2" in stream.getvalue()


def test_cuts_that_the_agents_did_not_notice_do_not_count() -> None:
    assert outcome(asked_cuts=4, cuts=4).were_cuts_made
    assert not outcome(asked_cuts=5, cuts=5).were_cuts_made


def test_the_json_object_has_what_programs_rely_on() -> None:
    shown = json.loads(json.dumps(to_json(outcome_json(outcome(), "embedded"))))
    assert shown["guest"] == "embedded"
    assert shown["guest_name"] == "demo"
    assert shown["proof"] == {"ram_equal": True, "guest_went_on": True, "equals_unmoved_run": True}
    assert shown["proof_holds"] is True
    assert set(shown) >= {
        *("total_s", "downtime_ms", "downtime_parts_ms", "rounds", "ram_bytes", "wire_bytes"),
        *("link_breaks", "resent_bytes", "link_cuts"),
    }


def test_a_pipe_gets_lines_a_program_nothing_and_a_terminal_both_ways_a_live_display() -> None:
    for as_json in (False, True):
        assert isinstance(open_steps(Terminal(), as_json=as_json), LiveSteps)
        assert isinstance(open_steps(io.StringIO(), as_json=as_json), PlainSteps)
    with open_steps(stream := io.StringIO(), as_json=True) as steps:
        steps.begins("one")
        steps.moving(view())
        steps.done("one")
    assert stream.getvalue() == ""
    with open_steps(stream := io.StringIO(), as_json=False) as steps:
        steps.begins("one")
        steps.done("one is \x1b[2J done")
    assert stream.getvalue() == "one is \\x1b[2J done\n"


def test_on_a_terminal_a_step_is_replaced_when_it_is_done() -> None:
    with LiveSteps(terminal := Terminal()) as steps:
        steps.begins("first")
        steps.begins("moving")
        steps.moving(view())
        steps.done("moved \x1b[2J")
        steps.begins("never ended")
    drawn = terminal.getvalue()
    assert "… first" in drawn
    assert "✓" in drawn
    assert "vm1: host-a to host-b" in drawn
    assert "moved \\x1b[2J" in drawn
    assert drawn.endswith("\r\x1b[K")


def test_a_terminal_without_unicode_gets_plain_marks() -> None:
    terminal = Terminal()
    terminal.encoding = "ascii"
    with LiveSteps(terminal) as steps:
        steps.done("one")
    assert "✓" not in terminal.getvalue()
    assert "+" in terminal.getvalue()
