"""The agent's way to its audit log: lines are handed over at once, and written by a task that may wait for the disk.

Tasks: `run` is one, in the agent's task group; it ends when it is cancelled, after a last write with a budget.
Law: whoever records a line never waits and never fails. A line that cannot be written is counted and stands in the
agent's own log instead.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Final

import anyio
import anyio.to_thread

from agents.audit import AuditFile, AuditLine, Outcome, RefusalFold
from agents.authorization import Action, GuestNames, Verdict
from agents.logs import get_logger, log_event
from agents.metrics import AgentMetrics

__all__ = ["AuditTrail"]

_log = get_logger(__name__)

# Lines that wait for a disk that is slow: a few MiB at most. Refusals are folded, so that these are real requests.
MAX_WAITING_LINES: Final = 2000
# How soon refusals that were only counted are said.
FOLD_EVERY_S: Final = 60.0
# A disk that hangs must not keep the agent from ending.
LAST_WRITE_S: Final = 2.0

_NO_GUEST: Final = GuestNames(name="", guest_id="")
_FOLDED: Final = frozenset({Outcome.DENIED, Outcome.REFUSED})


class AuditTrail:
    """Where everything that decides about peers says what it has decided."""

    def __init__(self, file: AuditFile, metrics: AgentMetrics) -> None:
        self._file = file
        self._metrics = metrics
        self._waiting: deque[AuditLine] = deque()
        self._arrived = anyio.Event()
        self._fold = RefusalFold()
        # A thread of its own: a disk that hangs must not take one that everything else needs.
        self._thread = anyio.CapacityLimiter(1)

    def decided(
        self,
        verdict: Verdict,
        peer: object,
        address: str,
        action: Action,
        *,
        guest: GuestNames | None = None,
        source: str | None = None,
        to: str | None = None,
        job: str = "",
    ) -> None:
        """Record what the rules said."""
        names = guest or _NO_GUEST
        self._record(
            AuditLine(
                at_s=time.time(),
                outcome=Outcome.ALLOWED if verdict.is_allowed else Outcome.DENIED,
                peer=str(peer),
                address=address,
                action=action,
                guest=names.name,
                guest_id=names.guest_id,
                source=source or "",
                to=to or "",
                rule=verdict.rule,
                reason=verdict.reason,
                job=job,
            )
        )

    def connection(self, outcome: Outcome, address: str, reason: str, peer: object = "") -> None:
        """Record a connection that was refused or cut; who a stranger is nobody knows."""
        self._record(
            AuditLine(
                at_s=time.time(),
                outcome=outcome,
                peer=str(peer),
                address=address,
                action="connect",
                reason=reason,
            )
        )

    async def run(self) -> None:
        """Write until cancelled."""
        try:
            while True:
                with anyio.move_on_after(FOLD_EVERY_S):
                    await self._arrived.wait()
                self._arrived = anyio.Event()
                self._say_left_out(time.monotonic())
                await self._write()
        finally:
            with anyio.move_on_after(LAST_WRITE_S, shield=True):
                await self._write()
                await anyio.to_thread.run_sync(self._file.close, abandon_on_cancel=True, limiter=self._thread)

    def _record(self, line: AuditLine) -> None:
        self._metrics.decided(line.outcome)
        now_s = time.monotonic()
        self._say_left_out(now_s)
        if line.outcome not in _FOLDED or self._fold.admits(line.peer, now_s):
            self._queue(line)

    def _say_left_out(self, now_s: float) -> None:
        for peer, count in self._fold.left_out(now_s):
            self._queue(
                AuditLine(
                    at_s=time.time(),
                    outcome=Outcome.REFUSED,
                    peer=peer,
                    address="",
                    action="",
                    reason="refused or denied too often to be listed one by one",
                    more=count,
                )
            )

    def _queue(self, line: AuditLine) -> None:
        if len(self._waiting) >= MAX_WAITING_LINES:
            self._lost(line, f"{MAX_WAITING_LINES} lines wait for the disk already")
            return
        self._waiting.append(line)
        self._arrived.set()

    async def _write(self) -> None:
        lines = list(self._waiting)
        self._waiting.clear()
        if lines:
            lost = await anyio.to_thread.run_sync(
                self._write_blocking, lines, abandon_on_cancel=True, limiter=self._thread
            )
            for line, cause in lost:
                self._lost(line, cause)

    def _write_blocking(self, lines: list[AuditLine]) -> list[tuple[AuditLine, str]]:
        lost: list[tuple[AuditLine, str]] = []
        for line in lines:
            try:
                self._file.append(line.to_bytes())
            except OSError as exc:
                lost.append((line, f"{self._file.path}: {exc.strerror or exc}"))
        try:
            self._file.sync()
        except OSError as exc:
            log_event(_log, logging.ERROR, "audit log not durable", cause=str(exc))
        return lost

    def _lost(self, line: AuditLine, cause: str) -> None:
        self._metrics.audit_line_lost()
        said = {name: value for name, value in line.facts().items() if value is not None}
        log_event(_log, logging.ERROR, "audit line not written", cause=cause, **said)
