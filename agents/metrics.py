"""Every figure of this agent and its migrations, for Prometheus. The help text of a metric defines its term.

Law: fed with `migrate.stats` values through `migrate.ports.Observer`, asks nobody and decides nothing. Feed it
from one thread (the event loop's); `render` may run in another. The number of series is bounded: per migration
they go an hour after it ended, and only the 64 that ended last are kept at all; guests and hosts that come and
go leave nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from migrate.phases import TERMINAL, Phase
from migrate.stats import Progress, Report, RoundStats

__all__ = ["CONTENT_TYPE", "AgentMetrics", "Direction", "MigrationMetrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_ENDED: Final = 64
KEEP_ENDED_S: Final = 3600.0
# Names come from other hosts: a label is kept short, whatever they send.
MAX_LABEL_CHARS: Final = 128
_JOB: Final = ("job", "guest", "direction")
# From the 1 ms of an idle small guest to a suspended large one.
_DOWNTIME_BUCKETS_S: Final = (
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    1,
    2,
    5,
    10,
    30,
    60,
    300,
)
# Around the 20 ms for which the loop may be late.
_LATENESS_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)


class Direction(StrEnum):
    """Whether a guest leaves this host or comes to it."""

    OUTGOING = "outgoing"
    INCOMING = "incoming"


# What is read from a Progress: metric, help, and whether it only grows.
_PROGRESS: Final[tuple[tuple[str, str, Callable[[Progress], float]], ...]] = (
    ("round", "Pass over the dirty pages that is under way; 1 is all of RAM.", lambda p: p.round_number),
    ("dirty_pages", "Pages that the guest had written when the last round ended.", lambda p: p.dirty_pages),
    ("remaining_pages", "Pages of this round that are not sent yet.", lambda p: p.remaining_pages),
    (
        "wire_rate_bytes_per_second",
        "Bytes given to the network per second, lately.",
        lambda p: p.wire_rate_bytes_per_s,
    ),
    (
        "dirty_rate_pages_per_second",
        "Different pages that the guest writes per second, over the last round.",
        lambda p: p.dirty_rate_pages_per_s,
    ),
    (
        "predicted_downtime_seconds",
        "Downtime to expect if the guest were stopped now: fixed parts and last dirty pages.",
        lambda p: p.predicted_downtime_s,
    ),
    ("is_paused", "1 while somebody holds the copying with `pause`; the guest runs.", lambda p: p.is_paused),
)
_PROGRESS_TOTALS: Final[tuple[tuple[str, str, Callable[[Progress], float]], ...]] = (
    (
        "wire_bytes",
        "Bytes given to the network, sealed, with headers and everything that was sent again.",
        lambda p: p.wire_bytes,
    ),
    (
        "resent_bytes",
        "Bytes of the wire bytes that were sent again after a link broke.",
        lambda p: p.resent_bytes,
    ),
    ("link_breaks", "Times that a data connection broke and was dialled again.", lambda p: p.link_breaks),
)


@dataclass(slots=True)
class _Series:
    """One migration: replaced values only, so a reader in another thread sees each of them whole."""

    labels: tuple[str, str, str]
    progress: Progress
    report: Report | None = None
    ended_at_s: float | None = None


class MigrationMetrics:
    """The observer of one migration: `migrate.ports.Observer`."""

    def __init__(self, series: _Series) -> None:
        """Use AgentMetrics.observe()."""
        self._series = series

    def phase_changed(self, old: Phase, new: Phase, because: str) -> None:
        """Show the new phase from now on."""
        self._series.progress = replace(self._series.progress, phase=new)

    def progressed(self, progress: Progress) -> None:
        """Show these figures from now on."""
        self._series.progress = progress

    def round_ended(self, round_stats: RoundStats) -> None:
        """Rounds are in the Report; their running figures are in Progress."""


class AgentMetrics(Collector):
    """The agent's figures in a registry of their own."""

    def __init__(self, agent_name: str, version: str, *, now_s: Callable[[], float] = time.monotonic) -> None:
        """`now_s` tells when ended migrations are old enough to be forgotten."""
        self._now_s = now_s
        self._running: dict[str, _Series] = {}
        self._ended: dict[str, _Series] = {}
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        registry = self.registry
        registry.register(self)
        Gauge("vmferry_agent_info", "1; who this is.", ["name", "version"], registry=registry).labels(
            agent_name, version
        ).set(1)
        self._draining = Gauge(
            "vmferry_agent_is_draining",
            "1 while the agent takes no new migrations because it was told to end.",
            registry=registry,
        )
        self._certificate = Gauge(
            "vmferry_certificate_expiry_timestamp_seconds",
            "When a certificate (own, ca) or the revocation list (crl) that this agent uses ends, in seconds since "
            "1970.",
            ["certificate"],
            registry=registry,
        )
        self._decisions = Counter(
            "vmferry_decisions",
            "Requests and connections by what was decided about them: allowed, denied (by the rules), refused "
            "(a certificate), cut (one that was revoked). Requests that only look are not counted "
            "when they are allowed.",
            ["verdict"],
            registry=registry,
        )
        self._audit_lost = Counter(
            "vmferry_audit_lines_lost",
            "Lines that could not be written to the audit log; they are in the agent's own log.",
            registry=registry,
        )
        self._outcomes = Counter(
            "vmferry_migrations",
            "Migrations that have ended, by the phase they ended in.",
            ["direction", "outcome"],
            registry=registry,
        )
        self._downtimes = Histogram(
            "vmferry_downtime_seconds",
            "Downtime of completed outgoing migrations: from the request to pause the guest at the source until "
            "the destination's word that it runs has arrived there.",
            buckets=_DOWNTIME_BUCKETS_S,
            registry=registry,
        )
        self._lateness = Histogram(
            "vmferry_loop_lateness_seconds",
            "How much later than asked for the event loop woke a task that sleeps for some ms: time for which "
            "something kept it from everything else.",
            buckets=_LATENESS_BUCKETS_S,
            registry=registry,
        )
        self._worst_lateness = Gauge(
            "vmferry_loop_lateness_worst_seconds",
            "The largest lateness since the agent started.",
            registry=registry,
        )
        self._worst_lateness_s = 0.0

    def observe(self, job: str, guest: str, direction: Direction) -> MigrationMetrics:
        """Begin the series of a migration. It counts as running until `ended` is called for `job`."""
        labels = (_label(job), _label(guest), str(direction))
        series = _Series(labels=labels, progress=Progress(phase=Phase.SETUP))
        self._ended.pop(job, None)
        self._running[job] = series
        return MigrationMetrics(series)

    def ended(self, job: str, report: Report) -> None:
        """Keep the last figures of a migration for a while. A job that is not running is ignored."""
        series = self._running.pop(job, None)
        if series is None:
            return
        series.report = report
        series.ended_at_s = self._now_s()
        self._ended[job] = series
        self._outcomes.labels(series.labels[2], str(report.phase)).inc()
        if (
            report.downtime is not None
            and report.phase is Phase.COMPLETE
            and series.labels[2] == Direction.OUTGOING
        ):
            self._downtimes.observe(report.downtime.total_s)
        self._forget()

    def loop_was_late(self, lateness_s: float) -> None:
        """Count one tick of whoever watches the event loop."""
        self._lateness.observe(lateness_s)
        if lateness_s > self._worst_lateness_s:
            self._worst_lateness_s = lateness_s
            self._worst_lateness.set(lateness_s)

    def set_certificate(self, which: str, not_after: datetime) -> None:
        """Tell when a certificate ends; `which` is `own`, `ca` or `crl`."""
        self._certificate.labels(which).set(not_after.timestamp())

    def decided(self, verdict: str) -> None:
        """Count what was decided about a request or a connection."""
        self._decisions.labels(verdict).inc()

    def audit_line_lost(self) -> None:
        """Count a line that is not in the audit log."""
        self._audit_lost.inc()

    def set_draining(self, is_draining: bool) -> None:
        """Tell whether the agent takes new migrations."""
        self._draining.set(is_draining)

    def render(self) -> bytes:
        """Give the text of all figures. Some ms of CPU with many migrations: call from a worker thread."""
        return generate_latest(self.registry)

    def describe(self) -> Iterable[Metric]:
        """Name nothing beforehand: the families below are this registry's alone."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Give the series of all migrations that run or have ended lately."""
        self._forget()
        running = list(self._running.values())
        shown = running + list(self._ended.values())
        count = GaugeMetricFamily("vmferry_migrations_running", "Migrations under way.", labels=["direction"])
        for direction in Direction:
            count.add_metric([direction], sum(1 for series in running if series.labels[2] == direction))
        yield count
        yield from _progress_families(shown)
        yield _phase_family(shown)
        yield _pages_family(shown)
        yield from _report_families([series for series in shown if series.report is not None])

    def _forget(self) -> None:
        too_old_s = self._now_s() - KEEP_ENDED_S
        for job, series in list(self._ended.items()):
            is_old = series.ended_at_s is not None and series.ended_at_s <= too_old_s
            if is_old or len(self._ended) > MAX_ENDED:
                self._ended.pop(job, None)


def _progress_families(shown: list[_Series]) -> Iterator[Metric]:
    for name, help_text, read in _PROGRESS:
        gauge = GaugeMetricFamily(f"vmferry_migration_{name}", help_text, labels=_JOB)
        for series in shown:
            gauge.add_metric(series.labels, read(series.progress))
        yield gauge
    for name, help_text, read in _PROGRESS_TOTALS:
        counter = CounterMetricFamily(f"vmferry_migration_{name}", help_text, labels=_JOB)
        for series in shown:
            counter.add_metric(series.labels, read(series.progress))
        yield counter


def _phase_family(shown: list[_Series]) -> Metric:
    phase = GaugeMetricFamily(
        "vmferry_migration_phase",
        f"1 for the phase that the migration is in; {', '.join(sorted(TERMINAL))} are the ends.",
        labels=(*_JOB, "phase"),
    )
    for series in shown:
        at = series.report.phase if series.report else series.progress.phase
        phase.add_metric((*series.labels, str(at)), 1)
    return phase


def _pages_family(shown: list[_Series]) -> Metric:
    pages = CounterMetricFamily(
        "vmferry_migration_pages",
        "Pages of 4096 bytes sent, by the kind they travelled as; a page sent in three rounds counts three times.",
        labels=(*_JOB, "kind"),
    )
    for series in shown:
        for kind, count in series.progress.counts.by_kind.items():
            pages.add_metric((*series.labels, kind), count)
    return pages


def _report_families(ended: list[_Series]) -> Iterator[Metric]:
    total = GaugeMetricFamily(
        "vmferry_migration_total_seconds", "From the request to move the guest until the end.", labels=_JOB
    )
    downtime = GaugeMetricFamily(
        "vmferry_migration_downtime_seconds",
        "From the request to pause the guest at the source until the destination's word that it runs has arrived.",
        labels=_JOB,
    )
    part = GaugeMetricFamily(
        "vmferry_migration_downtime_part_seconds",
        "Parts of the downtime, one after the other without gaps: pause, last-pages, device-state, load, resume.",
        labels=(*_JOB, "part"),
    )
    ram = GaugeMetricFamily(
        "vmferry_migration_ram_bytes", "All of the guest's RAM, holes included.", labels=_JOB
    )
    for series in ended:
        if series.report is None:
            continue
        total.add_metric(series.labels, series.report.total_s)
        ram.add_metric(series.labels, series.report.ram_bytes)
        if (parts := series.report.downtime) is not None:
            downtime.add_metric(series.labels, parts.total_s)
            for name, part_s in (
                ("pause", parts.pause_s),
                ("last-pages", parts.last_pages_s),
                ("device-state", parts.device_state_s),
                ("load", parts.load_s),
                ("resume", parts.resume_s),
            ):
                part.add_metric((*series.labels, name), part_s)
    yield from (total, downtime, part, ram)


def _label(value: str) -> str:
    # Lone surrogates cannot be written as UTF-8: one hostile name must not cost all the figures.
    return value[:MAX_LABEL_CHARS].encode("utf-8", "replace").decode()
