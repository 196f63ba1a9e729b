"""What the outgoing procedure is given: its settings, and everything outside that it needs.

Law: values and Protocols only.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from migrate.compression import Compression
from migrate.messages import Prepared
from migrate.ports import Caller, HostSurvey, Hypervisor, Journal, Observer, PayloadSender, SharedStorage
from transport.limits import WINDOW_BYTES

__all__ = ["DELTA_CACHE_BYTES", "SourcePorts", "SourceSettings"]

# Working sets of small guests fit, and four migrations at once take 256 MiB of a host that runs virtual machines.
DELTA_CACHE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """What the agent's configuration and the caller's wishes come down to.

    `order` is what the agent was asked for, in its own words: the journal keeps it, for a restart that goes on.
    `resumes` is the migration whose machine at the destination may have part of the RAM; see `messages.Prepare`.

    `call_timeout_s` bounds one request and its answer, `commit_timeout_s` the one that decides; the guest
    stands still during the latter.

    `delta_cache_bytes` of pages are kept at most, as the base of deltas; with `compression` off there are none.
    """

    migration_id: str
    host: str
    destination: str
    connections: int = 2
    window_bytes: int = WINDOW_BYTES
    compression: Compression = Compression.AUTO
    delta_cache_bytes: int = DELTA_CACHE_BYTES
    call_timeout_s: float = 30.0
    commit_timeout_s: float = 10.0
    audit: bool = True
    order: bytes = b""
    resumes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePorts:
    """Everything outside that the procedure needs."""

    hypervisor: Hypervisor
    caller: Caller
    storage: SharedStorage
    host_survey: HostSurvey
    journal: Journal
    observer: Observer
    # (answer of the destination, data secret) -> the sending side of the data plane
    open_sender: Callable[[Prepared, bytes], Awaitable[PayloadSender]]
    # Seconds, for figures; deadlines are the event loop's. (uvloop's own clock has steps of 1 ms.)
    clock: Callable[[], float] = time.perf_counter
