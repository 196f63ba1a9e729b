"""How often each peer may ask. Who asks more often waits for the answer, and nobody else does.

Law: pure; the time comes in as a number. A request is never refused for coming too early: a script that lists the jobs
in a loop gets slower, and nothing of it fails.
"""

from __future__ import annotations

from typing import Final

from transport.tls import Identity

__all__ = ["BURST_CALLS", "CALLS_PER_S", "Pace"]

# A list of jobs or guests costs some ms of the one event loop that also carries the moves: at this rate one peer takes
# less than a tenth of it. People, and scripts that move a rack of guests, stay far below.
CALLS_PER_S: Final = 50
# As many connections as a peer may have (`channels`), each with one request: all the links of a host that come back at
# once after an outage wait for nothing.
BURST_CALLS: Final = 128
# Peers whose pace is remembered before those are dropped who have been quiet for long enough to begin anew.
_KEPT_PEERS: Final = 256


class Pace:
    """The pace of all peers; connections of one identity share it."""

    def __init__(self) -> None:
        # When each peer would be through with all that it has asked, had it asked at the rate and without a burst.
        self._through_s: dict[Identity, float] = {}

    def wait_s(self, peer: Identity, now_s: float) -> float:
        """Count one request; give how long it has to wait."""
        if len(self._through_s) >= _KEPT_PEERS:
            self._through_s = {each: at_s for each, at_s in self._through_s.items() if at_s > now_s}
        through_s = max(self._through_s.get(peer, now_s), now_s) + 1 / CALLS_PER_S
        self._through_s[peer] = through_s
        return max(0.0, through_s - BURST_CALLS / CALLS_PER_S - now_s)
