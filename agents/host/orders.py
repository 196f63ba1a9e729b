"""What an operator asked for, as the journal keeps it: with it a restarted agent goes on with a move.

Law: values and their bytes. What cannot be read again is as if it were not there: the move is rolled back then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from agents.api import Move
from transport.errors import BadMessage, FrameTooLarge
from transport.schema import Schema

__all__ = ["MAX_ATTEMPTS", "Order"]

# A move that the agent, or the one at the other end, did not survive so often is not tried again: it may be the cause.
MAX_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One move: the job that watchers know, and which attempt this is, from 1 on.

    `resumes` is the migration before this one, whose machine at the destination may still have what it received.
    """

    job: str
    move: Move
    attempt: int = 1
    resumes: str = ""

    def to_bytes(self) -> bytes:
        return _SCHEMA.encode(self)

    @classmethod
    def from_bytes(cls, data: object) -> Order | None:
        """Read it from a journal's fact; None: there is none, or it was written by another release."""
        if not isinstance(data, bytes) or not data:
            return None
        try:
            order = _SCHEMA.decode(data)
        except (BadMessage, FrameTooLarge):
            return None
        return order if isinstance(order, cls) else None

    def again(self, migration_id: str) -> Order | None:
        """Give the next attempt after `migration_id`; None when there were enough."""
        if self.attempt >= MAX_ATTEMPTS:
            return None
        return replace(self, attempt=self.attempt + 1, resumes=migration_id)


_SCHEMA: Final = Schema(Order)
