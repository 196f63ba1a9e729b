"""The data listener: connections prove which migration they belong to, then their threads take over.

Tasks: one that accepts, and one per connection, all in the task group of `serve`; a connection's task ends with
its migration, its peer, or the agent. Nothing is parsed before the hello has passed; hellos under way are bounded.
"""

from __future__ import annotations

import logging
import socket
from typing import Final

import anyio
import anyio.abc
import anyio.to_thread

from agents.logs import get_logger, log_event
from transport import limits
from transport.bundle import ReceiveBundle
from transport.errors import TransportError
from transport.hello import answer_hello

__all__ = ["DataListener", "ListeningBundle"]

_log = get_logger(__name__)

BACKLOG: Final = 128
ACCEPT_PAUSE_S: Final = 0.2


class DataListener:
    """One listening socket for the data connections of all incoming migrations."""

    def __init__(self, host: str, port: int) -> None:
        """Bind now, so that a port that is taken is said at start."""
        self._listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
        self._listener.setblocking(False)
        self._bundles: dict[bytes, tuple[bytes, ReceiveBundle]] = {}
        self._hellos = anyio.CapacityLimiter(limits.MAX_PENDING_HANDSHAKES)

    @property
    def port(self) -> int:
        """Where it listens; the kernel chose it if 0 was asked for."""
        port: int = self._listener.getsockname()[1]
        return port

    def expect(self, session_id: bytes, hello_key: bytes, bundle: ReceiveBundle) -> None:
        """From now on take connections for this migration."""
        self._bundles[session_id] = (hello_key, bundle)

    def forget(self, session_id: bytes) -> None:
        """Take no more connections for this migration."""
        self._bundles.pop(session_id, None)

    def close(self) -> None:
        """Take no more connections at all."""
        self._listener.close()

    async def serve(self) -> None:
        """Accept until cancelled."""
        async with anyio.create_task_group() as connections:
            while True:
                await anyio.wait_readable(self._listener)
                try:
                    sock, address = self._listener.accept()
                except BlockingIOError:
                    continue  # it was gone again
                except OSError as exc:
                    # Out of descriptors: the connection stays in the backlog, and this must not spin on it.
                    log_event(_log, logging.ERROR, "data connection not accepted", cause=str(exc))
                    await anyio.sleep(ACCEPT_PAUSE_S)
                    continue
                if self._hellos.available_tokens < 1:
                    sock.close()
                    continue
                connections.start_soon(self._serve_connection, sock, address)

    async def _serve_connection(self, sock: socket.socket, address: tuple[str, int]) -> None:
        with sock:
            sock.setblocking(True)
            try:
                hello = await anyio.to_thread.run_sync(
                    answer_hello, sock, self._hello_key, limiter=self._hellos
                )
                if (expected := self._bundles.get(hello.session_id)) is None:
                    return  # its migration ended while it said hello
                await expected[1].serve_connection(sock)
            except (TransportError, OSError) as exc:
                log_event(_log, logging.INFO, "data connection ended", peer=address[0], cause=str(exc))
            except Exception:
                # A task's edge: what one connection meets must not end the agent.
                _log.exception("a data connection failed inside this agent")

    def _hello_key(self, session_id: bytes) -> bytes | None:
        expected = self._bundles.get(session_id)
        return expected[0] if expected else None


class ListeningBundle:
    """A ReceiveBundle that its migration's connections find: `migrate.ports.PayloadReceiver`."""

    def __init__(
        self, listener: DataListener, session_id: bytes, hello_key: bytes, bundle: ReceiveBundle
    ) -> None:
        self._listener = listener
        self._session_id = session_id
        self._bundle = bundle
        listener.expect(session_id, hello_key, bundle)

    @property
    def data_port(self) -> int:
        return self._listener.port

    @property
    def received_bytes(self) -> int:
        return self._bundle.received_bytes

    @property
    def failure(self) -> Exception | None:
        return self._bundle.failure

    async def await_applied(self, records: int, within_s: float) -> bool:
        return await self._bundle.await_applied(records, within_s)

    async def aclose(self) -> None:
        """Close all connections; when this returns the consumer is called no more. May be called twice."""
        self._listener.forget(self._session_id)
        await self._bundle.aclose()
