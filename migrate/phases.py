"""The phases of a migration, as one table for each end, and the one function that applies them.

Law: a change that has no row here cannot happen. Past the point of no return (the source's SWITCHOVER, the
destination's claim) no row leads back on a fault: a lost connection is IN_DOUBT there, and only ownership
leads out of it. With `SWITCHOVER + FAULT -> ROLLED_BACK` a lost reply would start two guests.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

__all__ = ["DESTINATION", "SOURCE", "TERMINAL", "Event", "Phase", "PhaseError", "advance", "can_cancel"]


class Phase(StrEnum):
    """Where a migration is. The words are the same on the wire, in metrics and in the journal."""

    SETUP = "setup"
    PREFLIGHT = "preflight"
    PRECOPY = "precopy"
    STOP = "stop"
    SWITCHOVER = "switchover"
    COMPLETE = "complete"
    ROLLED_BACK = "rolled-back"
    IN_DOUBT = "in-doubt"


class Event(StrEnum):
    """What moves a migration from one phase to the next."""

    PREPARED = "prepared"  # both ends have what they need to judge the move
    PASSED = "passed"  # the preflight found nothing against it
    CONVERGED = "converged"  # the planner switches over
    RETURNED = "returned"  # the link failed while the guest stood still: it runs on here and is copied on
    SUSPENDED = "suspended"  # the guest is stopped first, then copied (offline, or after a timeout)
    READY = "ready"  # digest equal and device state loaded: COMMIT may leave from now on
    PEER_RUNNING = "peer-running"  # the destination's word: it owns the guest and runs it
    PEER_REFUSED = "peer-refused"  # the destination's word: it never will run this guest
    COMMIT = "commit"  # the source's word: the destination may claim
    RUNNING = "running"  # claimed here, and running
    FAULT = "fault"
    CANCEL = "cancel"
    SOURCE_OWNS = "source-owns"  # read from the ownership record
    DESTINATION_OWNS = "destination-owns"


class PhaseError(Exception):
    """Our own mistake: the table has no such change."""

    def __init__(self, phase: Phase, event: Event) -> None:
        super().__init__(f"no row for event {event} in phase {phase}")
        self.phase = phase
        self.event = event


TERMINAL: Final = frozenset({Phase.COMPLETE, Phase.ROLLED_BACK})

_BEFORE_COMMIT: Final = (Phase.SETUP, Phase.PREFLIGHT, Phase.PRECOPY, Phase.STOP)
_ENDS_IN_ROLLBACK: Final = {
    (phase, event): Phase.ROLLED_BACK for phase in _BEFORE_COMMIT for event in (Event.FAULT, Event.CANCEL)
}

SOURCE: Final[Mapping[tuple[Phase, Event], Phase]] = MappingProxyType(
    {
        (Phase.SETUP, Event.PREPARED): Phase.PREFLIGHT,
        (Phase.PREFLIGHT, Event.PASSED): Phase.PRECOPY,
        (Phase.PREFLIGHT, Event.SUSPENDED): Phase.STOP,
        (Phase.PRECOPY, Event.CONVERGED): Phase.STOP,
        (Phase.PRECOPY, Event.SUSPENDED): Phase.STOP,
        (Phase.STOP, Event.RETURNED): Phase.PRECOPY,
        (Phase.STOP, Event.READY): Phase.SWITCHOVER,
        **_ENDS_IN_ROLLBACK,
        (Phase.SWITCHOVER, Event.PEER_RUNNING): Phase.COMPLETE,
        (Phase.SWITCHOVER, Event.PEER_REFUSED): Phase.ROLLED_BACK,
        (Phase.SWITCHOVER, Event.FAULT): Phase.IN_DOUBT,
        (Phase.IN_DOUBT, Event.DESTINATION_OWNS): Phase.COMPLETE,
        (Phase.IN_DOUBT, Event.SOURCE_OWNS): Phase.ROLLED_BACK,
    }
)

DESTINATION: Final[Mapping[tuple[Phase, Event], Phase]] = MappingProxyType(
    {
        (Phase.SETUP, Event.PREPARED): Phase.PRECOPY,
        (Phase.PRECOPY, Event.READY): Phase.STOP,
        (Phase.STOP, Event.COMMIT): Phase.SWITCHOVER,
        **_ENDS_IN_ROLLBACK,
        (Phase.SWITCHOVER, Event.RUNNING): Phase.COMPLETE,
        (Phase.SWITCHOVER, Event.SOURCE_OWNS): Phase.ROLLED_BACK,
        (Phase.SWITCHOVER, Event.FAULT): Phase.IN_DOUBT,
        (Phase.IN_DOUBT, Event.DESTINATION_OWNS): Phase.COMPLETE,
        (Phase.IN_DOUBT, Event.SOURCE_OWNS): Phase.ROLLED_BACK,
    }
)


def advance(table: Mapping[tuple[Phase, Event], Phase], phase: Phase, event: Event) -> Phase:
    """Give the phase that follows.

    Raises:
        PhaseError: ours; the procedure asked for a change that must not happen.
    """
    try:
        return table[phase, event]
    except KeyError:
        raise PhaseError(phase, event) from None


def can_cancel(phase: Phase) -> bool:
    """Tell whether the source may still cancel: it may until COMMIT may have left."""
    return (phase, Event.CANCEL) in SOURCE
