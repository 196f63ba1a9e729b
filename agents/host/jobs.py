"""The table of migrations: what runs, what ended lately, and who watches.

Law: no task and no wait but `changed`. A job is observer to its migration; it is the one place where a phase
change is logged, counted and shown.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Final

import anyio

from agents.api import JobView
from agents.config import LimitSettings
from agents.logs import get_logger, log_event
from agents.metrics import AgentMetrics, Direction
from migrate.controls import Controls
from migrate.errors import SetupRefused
from migrate.facts import MoveSlots
from migrate.phases import TERMINAL, Phase
from migrate.stats import PageCounts, Progress, Report, RoundStats

__all__ = ["Job", "JobTable", "UnknownJob"]

_log = get_logger(__name__)

# Jobs that are kept after their end, for `vmferry jobs`; older ones are in the journal's history.
MAX_ENDED_JOBS: Final = 64
# Rounds that a view shows: a move that takes thousands of rounds must not outgrow a message.
MAX_SHOWN_ROUNDS: Final = 200


class UnknownJob(SetupRefused):
    """No job of that identity on this host."""


class Job:
    """One migration on this host. `migrate.ports.Observer` of its procedure."""

    def __init__(
        self,
        *,
        job_id: str,
        guest_id: str,
        guest_name: str,
        source: str,
        destination: str,
        is_outgoing: bool,
        metrics: AgentMetrics,
        controls: Controls | None = None,
    ) -> None:
        self.job_id: Final = job_id
        # Of the attempt that runs or ran last: the name of its journal, and of the other agent's job.
        self.migration_id = job_id
        self.guest_id: Final = guest_id
        self.is_outgoing: Final = is_outgoing
        self.controls: Final = controls
        self._guest_name = guest_name
        self._source = source
        self._destination = destination
        self._metrics = metrics
        direction = Direction.OUTGOING if is_outgoing else Direction.INCOMING
        self._series = metrics.observe(job_id, guest_name, direction)
        self._started_at_s = time.time()
        self._phase = Phase.SETUP
        self._because = ""
        self._progress = Progress(phase=Phase.SETUP)
        self._rounds: list[RoundStats] = []
        self._report: Report | None = None
        self._has_ended = False
        self._changed = anyio.Event()

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def has_ended(self) -> bool:
        """No procedure works on it any more; IN_DOUBT may still be resolved."""
        return self._has_ended

    def view(self) -> JobView:
        """Give everything that a watcher may see."""
        return JobView(
            job=self.job_id,
            is_outgoing=self.is_outgoing,
            guest_id=self.guest_id,
            guest_name=self._guest_name,
            source=self._source,
            destination=self._destination,
            phase=self._phase,
            has_ended=self._has_ended,
            is_paused=self.controls is not None and self.controls.is_paused,
            started_at_s=self._started_at_s,
            because=self._because,
            progress=self._progress,
            rounds=tuple(self._rounds[-MAX_SHOWN_ROUNDS:]),
            report=self._report,
        )

    def next_change(self) -> anyio.Event:
        """Give what is set at the next change from now. Take it before `view`, and none is missed between."""
        return self._changed

    # -- migrate.ports.Observer

    def phase_changed(self, old: Phase, new: Phase, because: str) -> None:
        """Show, count and log it."""
        self._phase = new
        self._because = because
        self._series.phase_changed(old, new, because)
        level = logging.WARNING if new in (Phase.IN_DOUBT, Phase.ROLLED_BACK) else logging.INFO
        log_event(
            _log,
            level,
            "migration phase",
            job=self.job_id,
            guest=self._guest_name,
            old=str(old),
            new=str(new),
            because=because,
        )
        self._tell()

    def progressed(self, progress: Progress) -> None:
        """Show these figures from now on."""
        self._progress = progress
        self._series.progressed(progress)
        self._tell()

    def round_ended(self, round_stats: RoundStats) -> None:
        """Show the round and log what was decided after it."""
        self._rounds.append(round_stats)
        self._series.round_ended(round_stats)
        log_event(
            _log,
            logging.INFO,
            "migration round",
            job=self.job_id,
            round=round_stats.number,
            sent_pages=round_stats.sent_pages,
            dirty_pages=round_stats.dirty_pages,
            duration_s=round(round_stats.duration_s, 4),
            predicted_downtime_s=round(round_stats.predicted_downtime_s, 4),
            because=round_stats.because,
        )
        self._tell()

    def ended(self, report: Report | None, error: str | None = None) -> None:
        """The procedure is over. Incoming jobs give no report; theirs is made of what is known here."""
        self._has_ended = True
        self._report = report
        shown = report or self._incoming_report(error)
        if report is not None and report.error is not None:
            self._because = report.error
        self._metrics.ended(self.job_id, shown)
        log_event(
            _log,
            logging.INFO if self._phase is Phase.COMPLETE else logging.WARNING,
            "migration ended",
            job=self.job_id,
            guest=self._guest_name,
            phase=str(self._phase),
            runs_on=shown.runs_on or "unknown",
            total_s=round(shown.total_s, 3),
            downtime_ms=round(shown.downtime.total_s * 1e3, 2) if shown.downtime else "none",
            error=shown.error or "none",
        )
        self._tell()

    def resolved(self, phase: Phase, because: str) -> None:
        """A job in doubt was settled by its ownership record."""
        self.phase_changed(self._phase, phase, because)

    def _incoming_report(self, error: str | None) -> Report:
        runs_on = {Phase.COMPLETE: self._destination, Phase.ROLLED_BACK: self._source}.get(self._phase)
        return Report(
            phase=self._phase,
            guest_id=self.guest_id,
            guest_name=self._guest_name,
            source=self._source,
            destination=self._destination,
            runs_on=runs_on,
            error=error,
            total_s=time.time() - self._started_at_s,
            downtime=None,
            rounds=(),
            counts=PageCounts(),
            ram_bytes=0,
            wire_bytes=self._progress.wire_bytes,
            resent_bytes=0,
            link_breaks=0,
            tracking="",
            source_digest=None,
            destination_digest=None,
        )

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class JobTable:
    """All jobs of this host, oldest first."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def add(self, job: Job) -> None:
        """Keep a job, and forget the oldest that have ended for good."""
        self._jobs[job.job_id] = job
        ended = [old.job_id for old in self if old.has_ended and old.phase in TERMINAL]
        for job_id in ended[:-MAX_ENDED_JOBS]:
            del self._jobs[job_id]

    def get(self, job_id: str) -> Job:
        """Give a job. Raises UnknownJob."""
        if job_id not in self._jobs:
            raise UnknownJob(f"no job {job_id[:64]} on this host; `vmferry jobs` lists them")
        return self._jobs[job_id]

    def running(self, *, is_outgoing: bool) -> list[Job]:
        """Give the jobs of one direction that a procedure works on."""
        return [job for job in self if job.is_outgoing is is_outgoing and not job.has_ended]

    def slots_besides(self, guest_id: str, limits: LimitSettings, *, is_draining: bool) -> MoveSlots:
        """Give what is under way besides migrations of a guest, and whether those are under way themselves."""
        incoming, outgoing = self.running(is_outgoing=False), self.running(is_outgoing=True)
        others_coming = [job for job in incoming if job.guest_id != guest_id]
        others_leaving = [job for job in outgoing if job.guest_id != guest_id]
        return MoveSlots(
            incoming=len(others_coming),
            incoming_limit=limits.incoming,
            outgoing=len(others_leaving),
            outgoing_limit=limits.outgoing,
            is_draining=is_draining,
            is_coming=len(others_coming) < len(incoming),
            is_leaving=len(others_leaving) < len(outgoing),
        )

    def in_doubt(self) -> list[Job]:
        """Give the jobs that no procedure works on and whose guest nobody is sure of."""
        return [job for job in self if job.phase is Phase.IN_DOUBT and job.has_ended]

    def of_guest(self, guest_id: str) -> Job | None:
        """Give the job that holds this guest, if one does: running, or in doubt."""
        for job in self:
            if job.guest_id == guest_id and (not job.has_ended or job.phase is Phase.IN_DOUBT):
                return job
        return None
