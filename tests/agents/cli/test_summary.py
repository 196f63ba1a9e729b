from __future__ import annotations

import json
from dataclasses import replace

import pytest

from agents.cli.summary import ram_equal, report_json, summarize
from migrate.phases import Phase
from migrate.stats import PageCounts
from tests.agents.scripted_agent import report

COMPLETE = """\
ended           vm1 was moved from host-a to host-b, and runs there
total           1.25 s, 2 rounds
downtime        5.40 ms
  pause         500 us
  last pages    1.20 ms
  device state  2.00 ms
  load          1.00 ms
  resume        700 us
guest RAM       64.0 MiB
on the wire     21.0 MiB, 17.6 MB/s on average
  zero pages    8192, sent as runs
  raw pages     100 in 400 KiB
  zstd pages    8624 in 20.0 MiB, 59 % of their size
  delta pages   500 in 20.0 KiB, 1 % of their size
dirty log       userfaultfd
proof           all RAM was read again at the source (210 ms), the digests of both ends are equal: 0001020304050607"""

ROLLED_BACK = """\
ended          vm1 was not moved: it runs on host-a
because        the link fell
total          1.25 s, 2 rounds
guest RAM      64.0 MiB
on the wire    21.0 MiB, 17.6 MB/s on average
  zero pages   8192, sent as runs
  raw pages    100 in 400 KiB
  zstd pages   8624 in 20.0 MiB, 59 % of their size
  delta pages  500 in 20.0 KiB, 1 % of their size
link broke     twice, 3.00 MiB sent again
dirty log      userfaultfd
proof          none: the guest did not leave"""


def test_a_complete_move_reads_like_this() -> None:
    assert "\n".join(summarize(report())) == COMPLETE


def test_a_move_that_was_rolled_back_reads_like_this() -> None:
    failed = replace(report(Phase.ROLLED_BACK, "the link fell"), link_breaks=2, resent_bytes=3 << 20)
    assert "\n".join(summarize(failed)) == ROLLED_BACK


def test_what_an_earlier_attempt_had_brought_is_said() -> None:
    assert "resumed         12.0 MiB were there from an earlier attempt" in summarize(
        replace(report(), kept_pages=3 << 10)
    )


def test_a_move_in_doubt_claims_neither_host() -> None:
    first = summarize(report(Phase.IN_DOUBT, "the last answer was lost"))[0]
    assert first.endswith("in doubt: nobody knows yet whether vm1 runs on host-b")


def test_a_remark_on_a_complete_move_is_no_reason() -> None:
    lines = summarize(replace(report(), error="its old copy could not be read again"))
    assert any(line.startswith("remark ") for line in lines)
    assert not any(line.startswith("because ") for line in lines)


def test_nothing_moved_divides_by_nothing() -> None:
    empty = replace(report(), total_s=0.0, wire_bytes=0, rounds=(), counts=PageCounts(), tracking="")
    assert any("0 B" in line for line in summarize(empty))


@pytest.mark.parametrize(
    ("source", "destination", "equal"),
    [(b"x", b"x", True), (b"x", b"y", False), (None, b"x", None), (b"x", None, None), (None, None, None)],
)
def test_ram_is_equal_only_when_both_ends_say_so(
    source: bytes | None, destination: bytes | None, equal: bool | None
) -> None:
    judged = replace(report(), source_digest=source, destination_digest=destination)
    assert ram_equal(judged) is equal
    assert report_json(judged)["ram_equal"] is equal
    assert ("FAILED" in summarize(judged)[-1]) == (equal is False)


def test_the_json_has_every_promised_key_with_its_unit() -> None:
    printed = json.loads(json.dumps(report_json(report())))
    assert set(printed) >= {
        *("guest", "source", "destination", "phase", "runs_on", "error", "total_s", "downtime_ms"),
        *("downtime_parts_ms", "rounds", "ram_bytes", "wire_bytes", "pages", "payload_bytes"),
        *("resent_bytes", "link_breaks", "kept_pages", "tracking", "ram_equal"),
    }
    assert printed["downtime_ms"] == pytest.approx(5.4)
    assert list(printed["downtime_parts_ms"]) == ["pause", "last_pages", "device_state", "load", "resume"]
    assert sum(printed["downtime_parts_ms"].values()) == pytest.approx(printed["downtime_ms"])
    assert printed["pages"] == {"zero": 8192, "raw": 100, "zstd": 8624, "delta": 500}
    assert printed["payload_bytes"] == {"raw": 409_600, "zstd": 20 << 20, "delta": 20_480}
    assert [one["number"] for one in printed["rounds"]] == [0, 1]
    assert printed["rounds"][0]["predicted_downtime_ms"] == pytest.approx(31.0)


def test_a_move_without_downtime_has_null_for_it() -> None:
    printed = report_json(report(Phase.ROLLED_BACK, "the link fell"))
    assert (printed["downtime_ms"], printed["downtime_parts_ms"]) == (None, None)
