"""The source's part in measuring a path: what `vmferry check` knows of the way to a destination.

Tasks: those of `transport.measuring.measure`, and one per data connection while they are dialled; all end before a call
returns. Law: judges nothing (`migrate.preflight.network` does); whatever the network does becomes facts, not an error.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import anyio
import anyio.to_thread

from migrate.facts import PathFacts
from migrate.inspection import Asker
from migrate.messages import PROTOCOL, EndMeasure, MeasureEnded, MeasurePath, PathOpened, Ping, Pong
from transport import limits
from transport.errors import PeerMisbehaved, PeerRefused, TransportError
from transport.hello import CHALLENGE_BYTES, SESSION_ID_BYTES, say_hello
from transport.measuring import measure
from transport.seal import SECRET_BYTES, Keys
from transport.sockets import prepare_socket
from transport.tcpinfo import tcp_facts

__all__ = ["PathMeter"]

# One packet that is lost is sent again after a second: the connection still counts.
REACH_S: Final = 1.8
# The median of five tells the usual round trip though one of them met a busy moment.
PINGS: Final = 5
# Checks of several guests measure one after the other; who waits for longer than this goes without.
TURN_S: Final = 10.0
# Beside the measured second: the last acknowledgement and the answer.
_END_S: Final = 2.0


class PathMeter:
    """Looks at paths from this host, one measurement at a time."""

    def __init__(
        self,
        *,
        connections: int,
        window_bytes: int,
        bandwidth_bytes_per_s: int | None,
        reach_s: float = REACH_S,
    ) -> None:
        self._connections = connections
        self._window_bytes = window_bytes
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._reach_s = reach_s
        self._turn = anyio.Lock()

    async def look(self, asker: Asker, address: str, *, measures: bool) -> PathFacts:
        """Find out what there is to know of the path to a destination at `address`; `measures` takes a second."""
        ping_s = await self._ping(asker)
        unmeasured = "it was not asked for"
        if measures:
            unmeasured = f"this host has measured other paths for {TURN_S:g} s"
            with anyio.move_on_after(TURN_S) as waiting:
                await self._turn.acquire()
            if not waiting.cancelled_caught:
                try:
                    return await self._measure(asker, address, ping_s)
                except PeerRefused as exc:
                    unmeasured = exc.text
                except TransportError as exc:
                    unmeasured = str(exc)
                finally:
                    self._turn.release()
        return await self._connect(asker, address, ping_s, unmeasured)

    async def _ping(self, asker: Asker) -> float | None:
        taken_s = []
        try:
            for _ in range(PINGS):
                began_s = time.perf_counter()
                await asker.ask(Ping(), Pong)
                taken_s.append(time.perf_counter() - began_s)
        except TransportError:
            return None
        return statistics.median(taken_s)

    async def _connect(self, asker: Asker, address: str, ping_s: float | None, unmeasured: str) -> PathFacts:
        """Only try whether the destination's data port can be reached."""
        try:
            opened = await asker.ask(_request(b"", 0, 0), PathOpened)
        except TransportError as exc:
            cause = exc.text if isinstance(exc, PeerRefused) else str(exc)
            return PathFacts(data_port=0, data_error=cause, ping_s=ping_s, unmeasured=unmeasured)

        def greet() -> socket.socket:
            sock = self._dial(address, opened.data_port)
            try:
                # Who answers with this many bytes is no firewall's stand-in; the hello itself needs a migration.
                if len(sock.recv(CHALLENGE_BYTES, socket.MSG_WAITALL)) < CHALLENGE_BYTES:
                    raise OSError("the connection was closed at once")
            except BaseException:
                sock.close()
                raise
            return sock

        return await self._found(greet, opened.data_port, ping_s, unmeasured)

    async def _found(
        self, dial: Callable[[], socket.socket], data_port: int, ping_s: float | None, unmeasured: str
    ) -> PathFacts:
        try:
            sock = await anyio.to_thread.run_sync(dial)
        except (OSError, TransportError) as exc:
            return PathFacts(
                data_port=data_port, data_error=_words(exc), ping_s=ping_s, unmeasured=unmeasured
            )
        with sock:
            tcp = tcp_facts(sock)
        return PathFacts(
            data_port=data_port,
            rtt_s=tcp.rtt_s,
            ping_s=ping_s,
            mtu_bytes=tcp.mtu_bytes,
            mss_bytes=tcp.mss_bytes,
            unmeasured=unmeasured,
            cap_bytes_per_s=self._bandwidth_bytes_per_s,
        )

    async def _measure(self, asker: Asker, address: str, ping_s: float | None) -> PathFacts:
        secret = os.urandom(SECRET_BYTES)
        opened = await asker.ask(_request(secret, self._connections, self._window_bytes), PathOpened)
        if not 0 < opened.connections <= self._connections or len(opened.data_session) != SESSION_ID_BYTES:
            raise PeerMisbehaved("the destination opened another path than was asked for")
        try:
            return await self._measure_over(opened, Keys(secret), address, ping_s)
        finally:
            with anyio.move_on_after(_END_S, shield=True), suppress(TransportError):
                await asker.ask(EndMeasure(), MeasureEnded)

    async def _measure_over(
        self, opened: PathOpened, keys: Keys, address: str, ping_s: float | None
    ) -> PathFacts:
        connections: dict[int, socket.socket] = {}
        failures: list[Exception] = []

        def dial_blocking(slot: int) -> socket.socket:
            sock = self._dial(address, opened.data_port)
            try:
                say_hello(sock, opened.data_session, slot, keys.hello, timeout_s=self._reach_s)
            except BaseException:
                sock.close()
                raise
            return sock

        async def dial(slot: int) -> None:
            try:
                connections[slot] = await anyio.to_thread.run_sync(dial_blocking, slot)
            except (OSError, TransportError) as exc:
                failures.append(exc)

        try:
            async with anyio.create_task_group() as dialling:
                for slot in range(opened.connections):
                    dialling.start_soon(dial, slot)
            if failures:
                return PathFacts(
                    data_port=opened.data_port,
                    data_error=_words(failures[0]),
                    ping_s=ping_s,
                    unmeasured="no data connection could be made",
                )
            measured = await measure(
                connections,
                keys=keys,
                window_bytes=self._window_bytes,
                limit_bytes=opened.limit_bytes,
                bandwidth_bytes_per_s=self._bandwidth_bytes_per_s,
            )
        finally:
            for sock in connections.values():
                sock.close()
        goodput = measured.acked_bytes / measured.took_s
        if self._bandwidth_bytes_per_s:
            # The bucket of the cap begins full: one record more than the rate in the first second.
            goodput = min(goodput, float(self._bandwidth_bytes_per_s))
        return PathFacts(
            data_port=opened.data_port,
            rtt_s=measured.tcp.rtt_s,
            ping_s=ping_s,
            mtu_bytes=measured.tcp.mtu_bytes,
            mss_bytes=measured.tcp.mss_bytes,
            goodput_bytes_per_s=goodput,
            unmeasured=measured.broke,
            measured_s=measured.took_s,
            measured_bytes=measured.acked_bytes,
            connections=len(connections),
            retransmits=measured.tcp.retransmits,
            cap_bytes_per_s=self._bandwidth_bytes_per_s,
        )

    def _dial(self, address: str, port: int) -> socket.socket:
        sock = socket.create_connection((address, port), timeout=self._reach_s)
        prepare_socket(sock)
        return sock


def _request(secret: bytes, connections: int, window_bytes: int) -> MeasurePath:
    return MeasurePath(
        protocol=PROTOCOL,
        secret=secret,
        connections=min(connections, limits.MEASURE_CONNECTIONS),
        window_bytes=window_bytes,
    )


def _words(failure: Exception) -> str:
    if isinstance(failure, TimeoutError):
        return "nothing answers there: packets are dropped on the way"
    if isinstance(failure, ConnectionRefusedError):
        return "the connection is refused"
    return str(failure) or type(failure).__name__
