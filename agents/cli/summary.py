"""What a migration was, at its end: lines for people, one object for programs.

Law: pure; the report in, text out. The commands that move guests and the demo say the same with it. `report_json` is
an interface: keys may be added, never changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from agents.units import approx_duration, approx_rate, approx_size
from memory.layout import PAGE_BYTES
from migrate.phases import Phase
from migrate.stats import DowntimeParts, Report

__all__ = ["ram_equal", "report_json", "summarize", "summary_rows"]


def ram_equal(report: Report) -> bool | None:
    """Say whether both ends had the same RAM at the stop; None where that was not asked for or not reached."""
    if report.source_digest is None or report.destination_digest is None:
        return None
    return report.source_digest == report.destination_digest


def summarize(report: Report) -> list[str]:
    """Give the lines that a person reads after a move; see `summary_rows`."""
    rows = summary_rows(report)
    widest = max(len(name) for name, _ in rows)
    return [f"{name:<{widest}}  {text}" for name, text in rows]


def summary_rows(report: Report) -> list[tuple[str, str]]:
    """Give, as (name, text), how a move ended, how long, how much, and the proof. Parts have indented names.

    Text of guests and agents is in them as it came: escape the lines where they are printed.
    """
    rows = [("ended", _ending(report))]
    if report.error and report.phase is Phase.COMPLETE:
        rows.append(("remark", report.error))
    elif report.error:
        rows.append(("because", report.error))
    rows.append(("total", f"{approx_duration(report.total_s)}, {_rounds(len(report.rounds))}"))
    if report.downtime is not None:
        rows.append(("downtime", approx_duration(report.downtime.total_s)))
        rows += [(f"  {name}", approx_duration(part_s)) for name, part_s in _parts(report.downtime)]
    rows += _traffic(report)
    rows.append(("proof", _proof(report)))
    return rows


def report_json(report: Report) -> dict[str, object]:
    """Give a report as the JSON object that programs read. Units are in the names."""
    counts, downtime = report.counts, report.downtime
    return {
        "guest": report.guest_name,
        "guest_id": report.guest_id,
        "source": report.source,
        "destination": report.destination,
        "phase": report.phase.value,
        "runs_on": report.runs_on,
        "error": report.error,
        "total_s": report.total_s,
        "downtime_ms": None if downtime is None else downtime.total_s * 1e3,
        "downtime_parts_ms": None
        if downtime is None
        else {name.replace(" ", "_"): part_s * 1e3 for name, part_s in _parts(downtime)},
        "rounds": [
            {
                "number": one.number,
                "duration_s": one.duration_s,
                "sent_pages": one.sent_pages,
                "wire_bytes": one.wire_bytes,
                "dirty_pages": one.dirty_pages,
                "dirty_rate_pages_per_s": one.dirty_rate_pages_per_s,
                "goodput_bytes_per_s": one.goodput_bytes_per_s,
                "predicted_downtime_ms": one.predicted_downtime_s * 1e3,
                "because": one.because,
            }
            for one in report.rounds
        ],
        "ram_bytes": report.ram_bytes,
        "wire_bytes": report.wire_bytes,
        "pages": counts.by_kind,
        "payload_bytes": {"raw": counts.raw_bytes, "zstd": counts.zstd_bytes, "delta": counts.delta_bytes},
        "resent_bytes": report.resent_bytes,
        "link_breaks": report.link_breaks,
        "kept_pages": report.kept_pages,
        "tracking": report.tracking,
        "audit_s": report.audit_s,
        "ram_equal": ram_equal(report),
    }


def _ending(report: Report) -> str:
    guest = report.guest_name
    match report.phase:
        case Phase.COMPLETE:
            return f"{guest} was moved from {report.source} to {report.destination}, and runs there"
        case Phase.ROLLED_BACK:
            return f"{guest} was not moved: it runs on {report.runs_on or report.source}"
        case _:
            return f"in doubt: nobody knows yet whether {guest} runs on {report.destination}"


def _parts(downtime: DowntimeParts) -> Sequence[tuple[str, float]]:
    return (
        ("pause", downtime.pause_s),
        ("last pages", downtime.last_pages_s),
        ("device state", downtime.device_state_s),
        ("load", downtime.load_s),
        ("resume", downtime.resume_s),
    )


def _rounds(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"{rounds} rounds"


def _shrunk(pages: int, to_bytes: int) -> str:
    share = f", {100 * to_bytes / (pages * PAGE_BYTES):.0f} % of their size" if pages else ""
    return f"{pages} in {approx_size(to_bytes)}{share}"


def _traffic(report: Report) -> list[tuple[str, str]]:
    counts = report.counts
    rate = ""
    if report.total_s > 0 and report.wire_bytes:
        rate = f", {approx_rate(report.wire_bytes / report.total_s)} on average"
    rows = [
        ("guest RAM", approx_size(report.ram_bytes)),
        ("on the wire", f"{approx_size(report.wire_bytes)}{rate}"),
        ("  zero pages", f"{counts.zero_pages}, sent as runs"),
        ("  raw pages", f"{counts.raw_pages} in {approx_size(counts.raw_bytes)}"),
    ]
    rows.append(("  zstd pages", _shrunk(counts.zstd_pages, counts.zstd_bytes)))
    rows.append(("  delta pages", _shrunk(counts.delta_pages, counts.delta_bytes)))
    if report.link_breaks or report.resent_bytes:
        times = {1: "once", 2: "twice"}.get(report.link_breaks, f"{report.link_breaks} times")
        rows.append(("link broke", f"{times}, {approx_size(report.resent_bytes)} sent again"))
    if report.kept_pages:
        rows.append(
            ("resumed", f"{approx_size(report.kept_pages * PAGE_BYTES)} were there from an earlier attempt")
        )
    if report.tracking:
        rows.append(("dirty log", report.tracking))
    return rows


def _proof(report: Report) -> str:
    match ram_equal(report):
        case True:
            audit = "" if report.audit_s is None else f" ({approx_duration(report.audit_s)})"
            digest = (report.source_digest or b"").hex()[:16]
            return (
                f"all RAM was read again at the source{audit}, the digests of both ends are equal: {digest}"
            )
        case False:
            return "FAILED: all RAM was read again at the source, the digests of both ends differ"
        case None if report.phase is Phase.COMPLETE:
            return "the destination had every page that was sent; all RAM was not read again"
        case None:
            return "none: the guest did not leave"
