"""What one move took, whoever made it.

Law: values and arithmetic. Times are the host's; a guest's own clock stands still with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bench.qemu.source import Beats, Meter, largest_gap_ms

__all__ = ["Figures"]

# How late a look may see the last count.
LOOK_LATE_S: Final = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One move. `gap_ms` is the largest silence of the guest around the stop, `disturbed_ms` the largest before it.

    `downtime_ms` is from the source QEMU's STOP to the destination QEMU's RESUME, as they stamp them. `has_ended` is
    false for a move that had not ended in time: then `total_s` is that time, and the rest says nothing.
    """

    has_ended: bool
    total_s: float
    downtime_ms: float = 0.0
    gap_ms: float = 0.0
    disturbed_ms: float = 0.0
    wire_bytes: int = 0
    cpu_s: float = 0.0
    peak_mib: float = 0.0

    @classmethod
    def endless(cls, timeout_s: float) -> Figures:
        return cls(has_ended=False, total_s=timeout_s)

    @classmethod
    def of(
        cls,
        *,
        began_s: float,
        stopped_s: float,
        resumed_s: float,
        wire_bytes: int,
        meter: Meter,
        here: Beats,
        there: Beats,
    ) -> Figures:
        """Put together what was seen."""
        before = [at for at in here.at_s if began_s - 0.1 <= at <= stopped_s + LOOK_LATE_S]
        # Before it resumed there its count changed too, when the page arrived.
        after = [at for at in there.at_s if at >= resumed_s]
        around = [before[-1], after[0]] if before and after else []
        return cls(
            has_ended=True,
            total_s=resumed_s - began_s,
            downtime_ms=(resumed_s - stopped_s) * 1e3,
            gap_ms=(around[1] - around[0]) * 1e3 if around else 0.0,
            disturbed_ms=largest_gap_ms(before, began_s - 0.1, stopped_s + LOOK_LATE_S),
            wire_bytes=wire_bytes,
            cpu_s=meter.cpu_s,
            peak_mib=meter.peak_mib,
        )
