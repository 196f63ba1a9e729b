"""What can be changed about a running migration from outside: cancel, pause, limits.

Law: the procedure reads, everybody else writes, all on the event loop's thread. A request that comes too late
is refused, never queued.
"""

from __future__ import annotations

from dataclasses import replace

import anyio

from migrate.errors import MigrationCancelled, MigrationFailed, TooLate
from migrate.phases import Phase, can_cancel
from migrate.plan import Policy
from migrate.ports import PayloadSender

__all__ = ["Controls"]


class Controls:
    """The levers of one outgoing migration."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.phase = Phase.SETUP
        self.is_paused = False
        # Somebody took a hand in it: what it took says nothing about the next one.
        self.was_changed = False
        self.failure: MigrationFailed | None = None
        self._sender: PayloadSender | None = None
        self._scope: anyio.CancelScope | None = None
        self._resumed = anyio.Event()

    # -- for watchers and callers

    def cancel(self, failure: MigrationFailed | None = None) -> None:
        """End the migration and roll it back.

        Raises:
            TooLate: COMMIT may have left, so there is no way back any more.
        """
        if not can_cancel(self.phase):
            raise TooLate(f"the migration is in phase {self.phase}: it can no longer be cancelled")
        if self.failure is None:
            self.failure = failure or MigrationCancelled("cancelled by request")
        if self._scope is not None:
            self._scope.cancel()

    def pause(self) -> None:
        """Hold the pre-copy: the guest runs on, its writes are still logged, nothing is sent."""
        if self.phase not in (Phase.SETUP, Phase.PREFLIGHT, Phase.PRECOPY):
            raise TooLate(f"the migration is in phase {self.phase}: only the pre-copy can be paused")
        self.is_paused = self.was_changed = True
        self._apply_bandwidth()

    def resume(self) -> None:
        """Let a paused pre-copy go on."""
        self.is_paused = False
        self._apply_bandwidth()
        self._resumed.set()
        self._resumed = anyio.Event()

    def set_limits(
        self, *, downtime_limit_s: float | None = None, bandwidth_bytes_per_s: float | None = None
    ) -> None:
        """Change limits from now on; None leaves a limit as it is, a bandwidth of 0 lifts the cap."""
        self.was_changed = True
        if downtime_limit_s is not None:
            self.policy = replace(self.policy, downtime_limit_s=downtime_limit_s)
        if bandwidth_bytes_per_s is not None:
            self.policy = replace(self.policy, bandwidth_bytes_per_s=bandwidth_bytes_per_s or None)
            self._apply_bandwidth()

    # -- for the procedure

    def attach(self, scope: anyio.CancelScope) -> None:
        """From now on cancel() cancels this scope; a cancel that came before takes effect at once."""
        self._scope = scope
        if self.failure is not None:
            scope.cancel()

    def attach_sender(self, sender: PayloadSender) -> None:
        """From now on the bandwidth limit and pause act on this sender."""
        self._sender = sender
        self._apply_bandwidth()

    def detach(self) -> None:
        """The procedure is over: let go of its sender and its buffers; the controls stay with the job."""
        self._sender = None
        self._scope = None

    async def wait_while_paused(self) -> None:
        """Return when the pre-copy may go on."""
        while self.is_paused:
            await self._resumed.wait()

    def _apply_bandwidth(self) -> None:
        if self._sender is not None:
            self._sender.set_bandwidth(0 if self.is_paused else self.policy.bandwidth_bytes_per_s)
