"""What may go wrong in a world, what came of it, and the error that says that a guest was lost or doubled."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Final

__all__ = ["DEAD_PEER_S", "OUTAGE_S", "Faults", "Outcome", "TheoremBroken"]

OUTAGE_S: Final = 20.0
DEAD_PEER_S: Final = 5.0


class TheoremBroken(AssertionError):
    """Two copies of a guest ran at once, or one has wrong RAM, or none is left where none may be missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What may go wrong. Rates are chances for each opportunity, from 0 to 1."""

    outages: bool = True
    longest_outage_s: float = 3 * OUTAGE_S
    lost_replies: float = 0.05
    storage: float = 0.05
    storage_outages: bool = True
    # Of what is asked of the storage when an agent dies, so many is done later all the same.
    late_claims: float = 0.5
    refused_resumes: float = 0.1
    levers: float = 0.5
    spoiled_ram: float = 0.02
    # The mean time between two deaths of one agent at any moment; 0 is never.
    crash_every_s: float = 60.0
    # The chance to die just before, and just after, each entry of a journal and each thing that others see.
    crashes_at_journal: float = 0.03
    crashes_at_steps: float = 0.005
    # Of records: there are few, and everything hangs on them.
    crashes_at_claims: float = 0.02
    # The mean time between two ends of one agent that roll back first; 0 is never.
    stop_every_s: float = 120.0
    longest_down_s: float = 3 * OUTAGE_S

    @classmethod
    def of_a_day(cls, rng: random.Random) -> Faults:
        """Days differ: on most, little fails, so that moves come as far as the switchover; on some, everything does."""
        scale = rng.choice([0.05, 0.2, 0.2, 1.0])
        dying = rng.choice([0, 0.3, 1.0, 1.0, 3.0])
        usual = cls()
        return replace(
            usual,
            outages=rng.random() < 0.8,
            longest_outage_s=OUTAGE_S * rng.choice([0.5, 1.0, 3.0]),
            lost_replies=usual.lost_replies * scale,
            storage=usual.storage * scale,
            storage_outages=rng.random() < scale,
            refused_resumes=usual.refused_resumes * scale,
            spoiled_ram=usual.spoiled_ram * scale,
            crash_every_s=usual.crash_every_s / dying if dying and rng.random() < 0.5 else 0,
            crashes_at_journal=usual.crashes_at_journal * dying,
            crashes_at_steps=usual.crashes_at_steps * dying,
            crashes_at_claims=usual.crashes_at_claims * dying,
            stop_every_s=rng.choice([0, usual.stop_every_s]),
            longest_down_s=OUTAGE_S * rng.choice([0.1, 1.0, 3.0]),
        )

    @classmethod
    def deaths_only(cls) -> Faults:
        """Links that hold and storage that answers, so that moves come as far as COMMIT, and agents that die there."""
        return replace(
            cls.short_outages_only(),
            outages=False,
            refused_resumes=0.2,
            crash_every_s=60.0,
            crashes_at_journal=0.03,
            crashes_at_steps=0.01,
            crashes_at_claims=0.15,
        )

    @classmethod
    def short_outages_only(cls) -> Faults:
        """Links that are back before anybody may give up."""
        return cls(
            longest_outage_s=0.8 * OUTAGE_S,
            lost_replies=0,
            storage=0,
            storage_outages=False,
            refused_resumes=0,
            levers=0,
            spoiled_ram=0,
            crash_every_s=0,
            crashes_at_journal=0,
            crashes_at_steps=0,
            crashes_at_claims=0,
            stop_every_s=0,
        )


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one seed."""

    seed: int
    hosts: int = 0
    guests: int = 0
    moves: int = 0
    complete: int = 0
    rolled_back: int = 0
    in_doubt: int = 0
    stops: int = 0
    crashes: int = 0
    # Of the crashes, those just before or after an entry of a journal, or something that others see.
    crashes_at_steps: int = 0
    # Migrations that an agent found in its journals when it came back, and moves that it went on with.
    taken_up: int = 0
    gone_on: int = 0
    outages: int = 0
    virtual_s: float = 0.0
    story: list[str] = field(default_factory=list)
