"""The agent's certificate, key, CA and revocation list: read at the start, and again when the files have changed.

Tasks: `watch` is one, in the agent's task group, until it is cancelled. It looks every LOOK_EVERY_S, and at once when
it was asked to.
Law: new files are used whole or not at all. Files that do not prove this agent's identity are said once, and the old
ones go on. Connections keep what they began with, but for those of peers that a new list has revoked.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agents import pki
from agents.config import TlsSettings
from agents.errors import PkiRefused
from agents.logs import get_logger, log_event
from agents.metrics import AgentMetrics
from agents.revocation import read_list
from migrate.facts import CertificateFacts
from migrate.preflight.security import WARN_LEFT_S
from transport.errors import LocalMisuse
from transport.tls import Role, client_context, server_context

__all__ = ["Credentials"]

_log = get_logger(__name__)

# Four stat calls; a fleet that takes a certificate back waits no longer for it than for the copying of the list.
LOOK_EVERY_S: Final = 2.0
WARN_EVERY_S: Final = 86400.0
_DAY_S: Final = 86400.0

_Signature = tuple[tuple[int, int, int, int] | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    server: ssl.SSLContext
    client: ssl.SSLContext
    revoked: frozenset[str]
    ends: dict[str, tuple[Path, datetime]]


class Credentials:
    """What this agent proves itself with, and judges others by."""

    def __init__(self, tls: TlsSettings, name: str, metrics: AgentMetrics) -> None:
        """Read the files.

        Raises:
            PkiRefused, LocalMisuse: they cannot be used; the sentence says which and why.
        """
        self._tls = tls
        self._name = name
        self._metrics = metrics
        self._signature = self._look()
        self._loaded = self._load()
        self._asked = anyio.Event()
        self._warned_at_s = 0.0
        self._show()

    def server(self) -> ssl.SSLContext:
        """Give the context for connections that come in now."""
        return self._loaded.server

    def client(self) -> ssl.SSLContext:
        """Give the context for connections that are made now."""
        return self._loaded.client

    @property
    def revoked(self) -> frozenset[str]:
        """Serial numbers, in hexadecimal, of certificates that are accepted no more."""
        return self._loaded.revoked

    @property
    def ends(self) -> CertificateFacts:
        """When what this agent proves itself with, and judges others by, ends."""
        ends = {which: end.timestamp() for which, (_, end) in self._loaded.ends.items()}
        return CertificateFacts(
            own_ends_at_s=ends["own"], ca_ends_at_s=ends["ca"], crl_ends_at_s=ends.get("crl")
        )

    def ask_to_look(self) -> None:
        """Read the files again now, whether they look changed or not."""
        self._asked.set()

    async def watch(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Follow the files until cancelled; `on_change` is called after new ones are in use."""
        while True:
            with anyio.move_on_after(LOOK_EVERY_S):
                await self._asked.wait()
            was_asked, self._asked = self._asked.is_set(), anyio.Event()
            if await anyio.to_thread.run_sync(self._refresh, was_asked):
                await on_change()
            if time.time() - self._warned_at_s >= WARN_EVERY_S:
                self._warn()

    def _refresh(self, was_asked: bool) -> bool:
        """Use the files if they have changed and are good; tell whether new ones are in use. Blocks."""
        # Taken before they are read: what is written meanwhile is seen the next time.
        signature = self._look()
        if signature == self._signature and not was_asked:
            return False
        self._signature = signature
        try:
            self._loaded = self._load()
        except (PkiRefused, LocalMisuse) as exc:
            log_event(
                _log,
                logging.WARNING,
                "new certificates not used",
                cause=str(exc),
                because="the old ones go on",
            )
            return False
        log_event(_log, logging.INFO, "certificates read again", revoked=len(self._loaded.revoked))
        self._show()
        return True

    def _load(self) -> _Loaded:
        tls = self._tls
        problems = pki.identity_problems(
            certificate=tls.certificate, key=tls.key, ca=tls.ca, role=Role.AGENT, name=self._name
        )
        if problems:
            raise PkiRefused("; ".join(problems))
        ends = {
            "own": (tls.certificate, pki.describe(tls.certificate).not_after),
            "ca": (tls.ca, min(each.not_valid_after_utc for each in pki.load_certificates(tls.ca))),
        }
        revoked: frozenset[str] = frozenset()
        if tls.crl is not None:
            found = read_list(tls.crl, tls.ca)
            revoked = found.serials
            ends["crl"] = (tls.crl, found.ends)
        return _Loaded(
            server=server_context(tls.certificate, tls.key, tls.ca, tls.crl),
            client=client_context(tls.certificate, tls.key, tls.ca, tls.crl),
            revoked=revoked,
            ends=ends,
        )

    def _look(self) -> _Signature:
        return tuple(
            _signature_of(path)
            for path in (self._tls.ca, self._tls.certificate, self._tls.key, self._tls.crl)
            if path is not None
        )

    def _show(self) -> None:
        for which, (_, ends) in self._loaded.ends.items():
            self._metrics.set_certificate(which, ends)
        self._warn()

    def _warn(self) -> None:
        self._warned_at_s = time.time()
        for path, ends in self._loaded.ends.values():
            left_s = ends.timestamp() - self._warned_at_s
            if left_s < WARN_LEFT_S:
                log_event(
                    _log,
                    logging.WARNING,
                    "ends soon",
                    file=str(path),
                    ends=f"{ends:%Y-%m-%d %H:%M} UTC",
                    days_left=int(left_s // _DAY_S),
                    remedy="put a new one in its place; the agent takes it without a restart",
                )


def _signature_of(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
