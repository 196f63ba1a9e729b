"""This agent's predictions: made at a check or at a move's start, kept beside the outcome.

Law: nothing in here can end, hold up for long, or change a move: what goes wrong is a line in the log, and the move
has no prediction then. A guest is probed by one at a time, never while it is moved; a move that begins ends its probe
first, which takes some milliseconds, for two dirty logs of one guest are in each other's way.

Tasks: none of its own; probes run in the task of the check that asked, and the prediction of a move in one that its
caller starts.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import anyio
import anyio.to_thread

from agents.host.jobs import Job
from agents.host.parts import HostParts
from agents.logs import get_logger, log_event
from agents.predictions import PredictionFile, PredictionTable
from memory.errors import RamError
from migrate.errors import GuestBusy, MigrationError
from migrate.facts import GuestFacts
from migrate.forecast import (
    MAX_PROBE_S,
    MIN_PROBE_S,
    Conditions,
    GuestLoad,
    MoveOutcome,
    PastMove,
    Prediction,
)
from migrate.lessons import outcome_of
from migrate.predict import predict
from migrate.probing import probe
from migrate.stats import Report

__all__ = ["Forecasts", "Foretold", "Unpredicted"]

_log = get_logger(__name__)

FILE_NAME: Final = "predictions.jsonl"
# What a probe has shown is taken for a move, or for a check without a probe of its own, for so long.
LOAD_HOLDS_S: Final = 300.0
# Longer for a path: it changes with what others send, and the interval of a path that nobody has measured is far wider.
GOODPUT_HOLDS_S: Final = 3600.0
# Checks of one guest to several hosts share one probe.
SHARED_FOR_S: Final = 20.0
# Guests whose loads are kept; the oldest goes.
MAX_LOADS: Final = 256


class Unpredicted(Exception):
    """There is no prediction; the sentence says why. Nothing else is affected."""


@dataclass(slots=True)
class _Ticket:
    """A prediction that waits for its outcome. `is_alone`: no other move ran in this agent meanwhile."""

    prediction: Prediction
    job: str
    cpu_at_s: float
    is_alone: bool


@dataclass(slots=True)
class Foretold:
    """What is made beside a move: its prediction, which is there when `is_over`; None: there will be none."""

    ticket: _Ticket | None = None
    is_over: anyio.Event = field(default_factory=anyio.Event)


@dataclass(frozen=True, slots=True)
class _Probe:
    scope: anyio.CancelScope
    ended: anyio.Event


class Forecasts:
    """Probes guests, predicts moves, and remembers how they ended.

    Args:
        cpu: seconds of CPU of this process so far.
    """

    def __init__(self, host: HostParts, *, cpu: Callable[[], float] = time.process_time) -> None:
        self._host = host
        self._cpu = cpu
        self._file = PredictionFile(host.settings.agent.state_dir / FILE_NAME)
        self._file_lock = anyio.Lock()
        self._table: PredictionTable | None = None
        # By guest: what its last probe showed, and when.
        self._loads: dict[str, tuple[float, GuestLoad]] = {}
        self._probes: dict[str, _Probe] = {}
        self._probing: dict[str, anyio.Lock] = {}
        self._tickets: list[_Ticket] = []

    async def moves(self, guests: Iterable[str] = ()) -> list[PastMove]:
        """Give all predictions, or those of guests (identities or names), oldest first."""
        wanted = frozenset(guests)
        return [
            one
            for one in (await self._known()).moves()
            if not wanted
            or one.prediction.conditions.guest_id in wanted
            or one.prediction.conditions.guest_name in wanted
        ]

    # -- a check

    async def of_check(self, facts: GuestFacts, conditions: Conditions, probe_s: float) -> Prediction:
        """Probe a guest, unless it just was, and predict its move.

        Raises:
            Unpredicted: it is being moved, its writes cannot be seen, or a move began meanwhile.
        """
        probe_s = min(max(probe_s, MIN_PROBE_S), MAX_PROBE_S)
        lock = self._probing.setdefault(facts.guest_id, anyio.Lock())
        try:
            async with lock:
                load = self._load(facts.guest_id, SHARED_FOR_S, at_least_s=probe_s)
                if load is None:
                    load = await self._probe(facts, probe_s)
        finally:
            if lock.statistics().tasks_waiting == 0 and not lock.locked():
                self._probing.pop(facts.guest_id, None)
        prediction, _ = await self._predict(conditions, load)
        # In memory alone until a move takes it: nobody learns from a check that no move has followed.
        (await self._known()).add(prediction)
        return prediction

    async def _probe(self, facts: GuestFacts, probe_s: float) -> GuestLoad:
        if (holder := self._host.jobs.of_guest(facts.guest_id)) is not None:
            raise Unpredicted(f"{facts.name} is being moved by job {holder.job_id[:8]}: it cannot be watched")
        load: GuestLoad | None = None
        mine = self._probes[facts.guest_id] = _Probe(anyio.CancelScope(), anyio.Event())
        try:
            with mine.scope:
                guest = await self._host.hypervisors[facts.hypervisor].open_guest(facts.guest_id)
                try:
                    load = await probe(guest, probe_s)
                finally:
                    with anyio.CancelScope(shield=True):
                        await guest.release()
        except GuestBusy as exc:
            raise Unpredicted(str(exc)) from exc
        except (MigrationError, RamError, OSError) as exc:
            raise Unpredicted(f"{facts.name} could not be watched: {exc}") from exc
        finally:
            del self._probes[facts.guest_id]
            mine.ended.set()
        if load is None:
            raise Unpredicted(f"a move of {facts.name} began while it was watched")
        while len(self._loads) >= MAX_LOADS:
            del self._loads[next(iter(self._loads))]
        self._loads.pop(facts.guest_id, None)
        self._loads[facts.guest_id] = (anyio.current_time(), load)
        log_event(
            _log,
            logging.INFO,
            "guest probed",
            guest=facts.name,
            took_s=round(load.took_s, 3),
            populated_mib=load.populated_bytes >> 20,
            windows=" ".join(f"{one.window_s:.3f}s:{one.pages}" for one in load.windows) or "none",
        )
        return load

    # -- a move

    async def make_way(self, guest_id: str) -> None:
        """End a probe of this guest, if there is one, and wait until the guest is as it was."""
        while (running := self._probes.get(guest_id)) is not None:
            running.scope.cancel()
            await running.ended.wait()

    async def begin(self, job: Job, conditions: Conditions, foretold: Foretold) -> None:
        """Predict a move that has just begun: by the one of a check just made, or a new one."""
        cpu_at_s = self._cpu()
        try:
            prediction, spent_s = await self._of_move(conditions)
            await self._keep(prediction)
            # What it has cost itself is none of the move's.
            foretold.ticket = self._ticket(prediction, job, cpu_at_s + spent_s)
        except Exception:
            # A task's edge: no mistake in here may cost a move.
            _log.exception("a move could not be predicted")
        finally:
            foretold.is_over.set()

    def _ticket(self, prediction: Prediction, job: Job, cpu_at_s: float) -> _Ticket:
        # Moves that were under way share the CPU from here on.
        is_alone = not self._tickets
        for other in self._tickets:
            other.is_alone = False
        ticket = _Ticket(prediction=prediction, job=job.job_id, cpu_at_s=cpu_at_s, is_alone=is_alone)
        self._tickets.append(ticket)
        figures = prediction.figures
        log_event(
            _log,
            logging.INFO,
            "move predicted",
            job=job.job_id,
            basis=str(prediction.basis),
            total_s=_shown(figures.total_s.low, figures.total_s.high),
            downtime_ms=_shown(figures.downtime_s.low * 1e3, figures.downtime_s.high * 1e3),
            converging_share=round(prediction.converging_share, 2),
        )
        return ticket

    async def _of_move(self, conditions: Conditions) -> tuple[Prediction, float]:
        """Give the prediction, and the seconds of CPU that it took."""
        moves = (await self._known()).moves()
        now_s = time.time()
        for one in reversed(moves):
            made, then = one.prediction, one.prediction.conditions
            if now_s - made.made_at_s > LOAD_HOLDS_S:
                break
            is_free = one.outcome is None and all(t.prediction is not made for t in self._tickets)
            if is_free and replace(then, goodput_bytes_per_s=conditions.goodput_bytes_per_s) == conditions:
                return made, 0.0
        if conditions.goodput_bytes_per_s is None:
            conditions = replace(conditions, goodput_bytes_per_s=_seen_goodput(moves, conditions, now_s))
        return await self._predict(conditions, self._load(conditions.guest_id, LOAD_HOLDS_S))

    async def ended(self, foretold: Foretold, report: Report | None, *, is_comparable: bool) -> None:
        """Keep the outcome beside its prediction, and forget what was probed: the guest may be elsewhere.

        One that an operator paused or gave other limits, or that took several attempts, is not comparable.
        """
        await foretold.is_over.wait()
        ticket = foretold.ticket
        if ticket is None:
            return
        self._tickets.remove(ticket)
        self._loads.pop(ticket.prediction.conditions.guest_id, None)
        if report is None or not is_comparable:
            return
        spent_s = max(self._cpu() - ticket.cpu_at_s, 0.0)
        try:
            outcome = outcome_of(
                report,
                prediction_id=ticket.prediction.prediction_id,
                job=ticket.job,
                ended_at_s=time.time(),
                cpu_s=spent_s if ticket.is_alone else None,
            )
            await self._keep(outcome)
        except Exception:
            _log.exception("the outcome of a move could not be kept")

    # -- both

    async def _predict(self, conditions: Conditions, load: GuestLoad | None) -> tuple[Prediction, float]:
        moves = (await self._known()).moves()

        def work() -> tuple[Prediction, float]:
            began_s = time.thread_time()
            made = predict(conditions, load, moves, prediction_id=uuid.uuid4().hex, made_at_s=time.time())
            return made, time.thread_time() - began_s

        return await anyio.to_thread.run_sync(work)

    def _load(self, guest_id: str, holds_s: float, *, at_least_s: float = 0.0) -> GuestLoad | None:
        at_s, load = self._loads.get(guest_id, (-holds_s, None))
        if load is None or anyio.current_time() - at_s > holds_s or load.took_s < 0.9 * at_least_s:
            return None
        return load

    async def _known(self) -> PredictionTable:
        async with self._file_lock:
            if self._table is None:
                self._table = await anyio.to_thread.run_sync(self._file.read)
            return self._table

    async def _keep(self, value: Prediction | MoveOutcome) -> None:
        (await self._known()).add(value)
        async with self._file_lock:
            try:
                await anyio.to_thread.run_sync(self._file.append, value)
            except OSError as exc:
                log_event(
                    _log,
                    logging.WARNING,
                    "prediction not written",
                    file=str(self._file.path),
                    cause=str(exc),
                )
            finally:
                with contextlib.suppress(OSError):
                    self._file.close()


def _seen_goodput(moves: Sequence[PastMove], conditions: Conditions, now_s: float) -> float | None:
    """Give what the path to this destination was measured to carry when a move there was checked last."""
    for one in reversed(moves):
        then = one.prediction.conditions
        if now_s - one.prediction.made_at_s > GOODPUT_HOLDS_S:
            return None
        if then.destination == conditions.destination and then.goodput_bytes_per_s is not None:
            return then.goodput_bytes_per_s
    return None


def _shown(low: float, high: float) -> str:
    return f"{low:.3g}..{high:.3g}"
