"""The way that pages take from one host to another, as the source has found it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PathFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathFacts:
    """The data path from this source to one destination. None: not known.

    `data_error` says why no data connection could be made to `data_port`; empty: one was made. `rtt_s` is the network's
    round trip alone (TCP's smallest), `ping_s` the median of a request and its answer between the two agents.
    `goodput_bytes_per_s` is payload that the destination has acknowledged, sealed and over as many connections as pages
    take, in `measured_s`; where it is None, `unmeasured` says why. `cap_bytes_per_s` is the configured cap, which held
    for the measurement too.
    """

    data_port: int
    data_error: str = ""
    rtt_s: float | None = None
    ping_s: float | None = None
    mtu_bytes: int | None = None
    mss_bytes: int | None = None
    goodput_bytes_per_s: float | None = None
    unmeasured: str = ""
    measured_s: float = 0.0
    measured_bytes: int = 0
    connections: int = 0
    retransmits: int = 0
    cap_bytes_per_s: int | None = None
