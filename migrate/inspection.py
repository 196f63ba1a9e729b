"""The source's side of the control plane: typed questions, and the preflight made of them.

Law: asks and judges, changes nothing; what it writes beside disks it clears again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import anyio

from migrate.facts import PathFacts
from migrate.messages import DENIED, PROTOCOL, Inspect, Inspected
from migrate.ports import Caller, HostSurvey, Hypervisor, SeenGuest, SharedStorage
from migrate.preflight import Denied, Inspection, PreflightReport, examine, examine_denied
from transport.errors import PeerMisbehaved, PeerRefused

__all__ = ["Asker", "dry_run", "run_preflight"]

_Reply = TypeVar("_Reply")


class Asker:
    """Asks one question at a time, though several tasks have questions."""

    def __init__(self, caller: Caller, timeout_s: float) -> None:
        self._caller = caller
        self._timeout_s = timeout_s
        self._lock = anyio.Lock()

    async def ask(
        self, request: object, *reply_types: type[_Reply], timeout_s: float | None = None
    ) -> _Reply:
        """Ask, and insist on one of these types of reply.

        Raises:
            PeerMisbehaved: theirs; a reply of another type.
            PeerRefused, PeerGone: as `Caller.call`.
        """
        async with self._lock:
            reply = await self._caller.call(request, timeout_s=timeout_s or self._timeout_s)
        if not isinstance(reply, reply_types):
            raise PeerMisbehaved(f"{type(request).__name__} was answered with {type(reply).__name__}")
        return reply


async def run_preflight(
    guest: SeenGuest,
    asker: Asker,
    storage: SharedStorage,
    host_survey: HostSurvey,
    *,
    source_host: str,
    resumes: str = "",
) -> PreflightReport:
    """Ask both ends and judge; `resumes` names an earlier attempt. The path is not measured: pages travel on it."""
    seen = await _look(guest, asker, storage, host_survey, source_host=source_host, resumes=resumes)
    return examine_denied(seen) if isinstance(seen, Denied) else examine(seen)


async def _look(
    guest: SeenGuest,
    asker: Asker,
    storage: SharedStorage,
    host_survey: HostSurvey,
    *,
    source_host: str,
    resumes: str = "",
) -> Inspection | Denied:
    """Ask both ends. The probes are cleared, whatever happens."""
    probes, nonces = await storage.plant(guest.facts.disks)
    try:
        ownership_dir = await storage.ownership_dir(guest.facts)
        here, asked_at_s = await host_survey.survey(guest.facts), anyio.current_time()
        inspected = await asker.ask(
            Inspect(
                protocol=PROTOCOL,
                guest=guest.facts,
                probes=probes,
                ownership_dir=ownership_dir,
                resumes=resumes,
            ),
            Inspected,
        )
        answer_s = anyio.current_time() - asked_at_s
    except PeerRefused as exc:
        if exc.code != DENIED:
            raise
        return Denied(guest=guest.facts, source_host=source_host, here=here, reason=exc.text)
    finally:
        with anyio.CancelScope(shield=True):
            await storage.clear(probes)
    return Inspection(
        guest=guest.facts,
        source_host=source_host,
        host=inspected.host,
        here=here,
        there=inspected.survey,
        answer_s=answer_s,
        objections=inspected.objections,
        nonces=nonces,
        readings=inspected.readings,
        ownership_error=inspected.ownership_error,
        reserved_bytes=inspected.reserved_bytes,
    )


async def dry_run(
    guest_id: str,
    hypervisor: Hypervisor,
    caller: Caller,
    storage: SharedStorage,
    host_survey: HostSurvey,
    *,
    source_host: str,
    timeout_s: float,
    time_limit_s: float = 0.0,
    look_at_path: Callable[[Asker], Awaitable[PathFacts]] | None = None,
) -> tuple[PreflightReport, PathFacts | None]:
    """Run the preflight of a move that is not made, also of a guest that cannot be; give also what the path is like.

    `time_limit_s` is what a move may take, 0 for as long as it likes. The path is looked at when the guest is held no
    longer: that takes a second, in which somebody may want to move it.
    """
    asker = Asker(caller, timeout_s)
    guest = await hypervisor.inspect_guest(guest_id)
    try:
        seen = await _look(guest, asker, storage, host_survey, source_host=source_host)
    finally:
        with anyio.CancelScope(shield=True):
            await guest.release()
    if isinstance(seen, Denied):
        return examine_denied(seen), None
    path = await look_at_path(asker) if look_at_path is not None else None
    return examine(replace(seen, path=path, time_limit_s=time_limit_s)), path
