"""One thing that is fuzzed: a function of bytes, the errors it may raise, and what it may cost.

Law: an input is judged here and nowhere else. `check` raises LawBroken, or whatever error the input got out of the
product that is not among the allowed ones; every execution is measured, by a person's replay, by the suite and by
atheris alike.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["KIB", "MIB", "LawBroken", "Target", "law"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20


class LawBroken(AssertionError):
    """An input for which a target's law does not hold. The sentence says which part of it."""


def law(holds: object, sentence: str) -> None:
    """Raise LawBroken with this sentence unless it holds."""
    if not holds:
        raise LawBroken(sentence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One parser, or one procedure that a peer drives.

    Args:
        law: what holds for every input, in a sentence.
        fuzz: feeds one input; raises nothing but `allowed`, or LawBroken.
        allowed: the errors that the product documents for this input.
        seeds: valid inputs, made by code; mutations begin there.
        most_input_bytes: inputs are no longer than this.
        most_cpu_s: of one input, all threads, with coverage measured (some 10 times slower than without).
        most_allocated_bytes: at any moment of one input, beyond what was there before it.
    """

    name: str
    law: str
    fuzz: Callable[[bytes], None]
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], tuple[bytes, ...]]
    most_input_bytes: int = 4 * KIB
    most_cpu_s: float = 1.0
    most_allocated_bytes: int = 8 * MIB

    def check(self, data: bytes) -> None:
        """Feed one input, and insist on the law and the costs.

        Raises:
            LawBroken: the law does not hold, or it cost too much.
            Exception: an error that is not allowed.
        """
        was_tracing = tracemalloc.is_tracing()
        if not was_tracing:
            tracemalloc.start()
        tracemalloc.reset_peak()
        before_bytes = tracemalloc.get_traced_memory()[0]
        began_s = time.process_time()
        try:
            self.fuzz(data)
        except self.allowed:
            pass
        finally:
            spent_s = time.process_time() - began_s
            grown_bytes = tracemalloc.get_traced_memory()[1] - before_bytes
            if not was_tracing:
                tracemalloc.stop()
        law(spent_s <= self.most_cpu_s, f"{len(data)} bytes took {spent_s:.2f} s")
        law(grown_bytes <= self.most_allocated_bytes, f"{len(data)} bytes allocated {grown_bytes >> 10} KiB")
