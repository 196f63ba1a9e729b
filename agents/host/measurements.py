"""The destination's part in measuring a path: what a source sends is opened, counted and thrown away.

Tasks: one per measurement, in the agent's task group; it ends the measurement when its time is over, and with it.
Law: one measurement at a time, bounded in connections, bytes and seconds (`transport.limits`), whatever a source does.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import anyio
import anyio.abc

from agents.host.data import DataListener, ListeningBundle
from agents.logs import get_logger, log_event
from memory.codec import MAX_PAYLOAD_BYTES
from migrate.destination import check_protocol
from migrate.messages import MeasureEnded, MeasurePath, PathOpened
from transport import limits
from transport.bundle import ReceiveBundle
from transport.errors import PeerRefused
from transport.hello import SESSION_ID_BYTES
from transport.seal import SECRET_BYTES, Keys

__all__ = ["Measurements"]

_log = get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class _Measurement:
    """One that is under way."""

    peer: str
    receiver: ListeningBundle
    deadline: anyio.CancelScope


class Measurements:
    """Takes part in sources' measurements of the path to this host."""

    def __init__(
        self,
        host: str,
        data: DataListener,
        tasks: anyio.abc.TaskGroup,
        *,
        ends_s: float = limits.MEASURE_ENDS_S,
        limit_bytes: int = limits.MEASURE_BYTES,
    ) -> None:
        self._host = host
        self._data = data
        self._tasks = tasks
        self._ends_s = ends_s
        self._limit_bytes = limit_bytes
        # By the peer and its control session: an identity of a session is no secret, and ends nobody else's.
        self._running: dict[tuple[str, bytes], _Measurement] = {}

    async def begin(self, session_id: bytes, request: MeasurePath, peer: str) -> PathOpened:
        """Open the way for a source's noise.

        Raises:
            PeerRefused: `busy` while another measurement is under way.
        """
        check_protocol(request.protocol)
        if request.connections == 0:
            return PathOpened(data_port=self._data.port, data_session=b"", connections=0, limit_bytes=0)
        if len(request.secret) != SECRET_BYTES or request.connections < 0:
            raise PeerRefused("order", "such a measurement cannot be made")
        if len(self._running) >= limits.MEASURES_AT_ONCE:
            other = next(iter(self._running.values())).peer
            raise PeerRefused("busy", f"{self._host} measures the path from {other} just now; ask again")
        keys = Keys(request.secret)
        # Named by this side: a source must not be able to name the connections of another one's migration.
        data_session = os.urandom(SESSION_ID_BYTES)
        connections = min(request.connections, limits.MEASURE_CONNECTIONS)
        bundle = ReceiveBundle(
            keys=keys,
            consumer=_throw_away,
            window_bytes=min(max(request.window_bytes, MAX_PAYLOAD_BYTES), limits.MAX_WINDOW_BYTES),
            max_connections=connections,
            limit_bytes=self._limit_bytes,
        )
        receiver = ListeningBundle(self._data, data_session, keys.hello, bundle)
        measurement = _Measurement(peer=peer, receiver=receiver, deadline=anyio.CancelScope())
        self._running[peer, session_id] = measurement
        self._tasks.start_soon(self._end_in_time, measurement)
        return PathOpened(
            data_port=self._data.port,
            data_session=data_session,
            connections=connections,
            limit_bytes=self._limit_bytes,
        )

    async def end(self, session_id: bytes, peer: str) -> MeasureEnded:
        """End what this peer has begun in this session, if it has; nothing of it is left when this returns."""
        measurement = self._running.get((peer, session_id))
        if measurement is None:
            return MeasureEnded(received_bytes=0)
        await self._end(measurement)
        return MeasureEnded(received_bytes=measurement.receiver.received_bytes)

    async def end_all(self, *, of: str | None = None) -> None:
        """End all measurements; with `of` only those of that agent."""
        for measurement in list(self._running.values()):
            if of in (None, measurement.peer):
                await self._end(measurement)

    async def _end(self, measurement: _Measurement) -> None:
        with anyio.CancelScope(shield=True):
            # Its threads end with their connections. Only then may the next one begin.
            await measurement.receiver.aclose()
        for key, running in list(self._running.items()):
            if running is measurement:
                del self._running[key]
        measurement.deadline.cancel()

    async def _end_in_time(self, measurement: _Measurement) -> None:
        try:
            with measurement.deadline:
                await anyio.sleep(self._ends_s)
                log_event(_log, logging.INFO, "measurement ended by its deadline", peer=measurement.peer)
        finally:
            await self._end(measurement)


def _throw_away(payload: memoryview) -> None:
    """Noise was opened, which is all that was asked for."""
