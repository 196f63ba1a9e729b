"""How fast and how often: a token bucket and a back-off. Pure: time and chance come in as arguments."""

from __future__ import annotations

import math
import random
from typing import Final

from transport.errors import LocalMisuse

__all__ = ["Backoff", "TokenBucket"]


class TokenBucket:
    """A rate that all connections of a migration share. Not thread-safe: the caller holds a lock.

    A take may go into debt: it says how long to wait *before* the bytes may be sent, and later takes wait
    behind it. So a record larger than the burst passes, and no rate is exceeded over time.
    """

    def __init__(self, rate_bytes_per_s: float | None, burst_bytes: int) -> None:
        if burst_bytes < 1:
            raise LocalMisuse("a burst has at least one byte")
        self._burst_bytes: Final = burst_bytes
        self._rate = _checked(rate_bytes_per_s)
        self._tokens_bytes = float(burst_bytes)
        self._as_of_s = -math.inf

    @property
    def rate_bytes_per_s(self) -> float | None:
        """None: no cap. 0: everything is held."""
        return self._rate

    def take(self, taken_bytes: int, now_s: float) -> float:
        """Take `taken_bytes` and give the seconds to wait before they may go; infinite while held.

        An infinite answer took nothing: take again after set_rate.
        """
        self._refill(now_s)
        if self._rate is None:
            return 0.0
        if self._rate == 0:
            return math.inf
        self._tokens_bytes -= taken_bytes
        return max(0.0, -self._tokens_bytes / self._rate)

    def give_back(self, taken_bytes: int, now_s: float) -> None:
        """Undo a take whose bytes were not sent, so that it can be taken again at another rate."""
        self._refill(now_s)
        self._tokens_bytes = min(float(self._burst_bytes), self._tokens_bytes + taken_bytes)

    def set_rate(self, rate_bytes_per_s: float | None, now_s: float) -> None:
        """Change the rate from now on. A debt stays a debt in bytes, paid at the new rate."""
        self._refill(now_s)
        self._rate = _checked(rate_bytes_per_s)

    def _refill(self, now_s: float) -> None:
        # A clock that stands still or goes back gives nothing and takes nothing.
        elapsed_s = max(0.0, now_s - self._as_of_s)
        self._as_of_s = max(self._as_of_s, now_s)
        if self._rate is None:
            self._tokens_bytes = float(self._burst_bytes)
        elif self._rate > 0:
            self._tokens_bytes = min(float(self._burst_bytes), self._tokens_bytes + elapsed_s * self._rate)


def _checked(rate_bytes_per_s: float | None) -> float | None:
    if rate_bytes_per_s is not None and not 0 <= rate_bytes_per_s < math.inf:
        raise LocalMisuse(f"not a rate: {rate_bytes_per_s}")
    return rate_bytes_per_s


class Backoff:
    """Delays between attempts: doubling from `initial_s` to `max_s`, each between half and the whole of it.

    The jitter keeps many migrations that lost the same switch from dialling in step.
    """

    def __init__(self, initial_s: float, max_s: float, rng: random.Random) -> None:
        if not 0 < initial_s <= max_s:
            raise LocalMisuse(f"not a back-off: from {initial_s} to {max_s} seconds")
        self._initial_s: Final = initial_s
        self._max_s: Final = max_s
        self._rng: Final = rng
        self._next_s = initial_s

    def next_s(self) -> float:
        """The seconds to wait before the next attempt."""
        whole_s = self._next_s
        self._next_s = min(self._max_s, 2 * whole_s)
        return whole_s * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin again: an attempt succeeded."""
        self._next_s = self._initial_s
