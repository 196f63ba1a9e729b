"""The source's side of the control plane: typed questions, and the preflight made of them.

Law: asks and judges, changes nothing; what it writes beside disks it clears again.
"""

from __future__ import annotations

from typing import TypeVar

import anyio

from migrate.messages import PROTOCOL, Inspect, Inspected
from migrate.ports import Caller, HostSurvey, Hypervisor, RunningGuest, SharedStorage
from migrate.preflight import Inspection, PreflightReport, examine
from transport.errors import PeerMisbehaved

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
    guest: RunningGuest,
    asker: Asker,
    storage: SharedStorage,
    host_survey: HostSurvey,
    *,
    source_host: str,
    resumes: str = "",
) -> PreflightReport:
    """Ask both ends and judge; `resumes` names an earlier attempt. The probes are cleared, whatever happens."""
    probes, nonces = await storage.plant(guest.facts.disks)
    try:
        ownership_dir = await storage.ownership_dir(guest.facts)
        before = await storage.look(probes)
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
        after = await storage.look(probes)
    finally:
        with anyio.CancelScope(shield=True):
            await storage.clear(probes)
    return examine(
        Inspection(
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
            probes=probes,
            before=before,
            after=after,
        )
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
) -> PreflightReport:
    """Run the preflight of a move that is not made."""
    guest = await hypervisor.open_guest(guest_id)
    try:
        return await run_preflight(
            guest, Asker(caller, timeout_s), storage, host_survey, source_host=source_host
        )
    finally:
        with anyio.CancelScope(shield=True):
            await guest.release()
