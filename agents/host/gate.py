"""Where requests meet the rules of [[allow]]: each decision is made here, and said to the audit log.

Law: decides nothing itself (`agents.authorization` does); obeys no request. What is allowed and only looks has no line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agents.api import JobView
from agents.authorization import RIGHT_FOR, AccessPolicy, Action, GuestNames, Right
from agents.host.audittrail import AuditTrail
from migrate.errors import SetupRefused
from migrate.facts import GuestFacts, Permission
from migrate.messages import DENIED
from transport.errors import PeerRefused
from transport.tls import Identity, Role

__all__ = ["UNKNOWN_GUEST", "Gate", "names_among"]

UNKNOWN_GUEST: Final = GuestNames(name="", guest_id="")


class Gate:
    """The rules of this host, and where it is written down what they said."""

    def __init__(self, policy: AccessPolicy, trail: AuditTrail) -> None:
        self._policy = policy
        self._trail = trail

    def pass_or_refuse(
        self,
        peer: Identity,
        address: str,
        action: Action,
        *,
        what: str = "",
        guest: GuestNames | None = None,
        source: str | None = None,
        to: str | None = None,
        job: str = "",
        only_looks: bool = False,
    ) -> None:
        """Let a request through, or refuse it.

        Raises:
            PeerRefused: the rules do not allow it to an agent.
            SetupRefused: the rules do not allow it to an operator.
        """
        verdict = self._policy.decide(peer, action, what=what, guest=guest, source=source, to=to)
        if not (verdict.is_allowed and (only_looks or RIGHT_FOR[action] is Right.VIEW)):
            self._trail.decided(verdict, peer, address, action, guest=guest, source=source, to=to, job=job)
        if not verdict.is_allowed:
            raise (
                PeerRefused(DENIED, verdict.reason)
                if peer.role is Role.AGENT
                else SetupRefused(verdict.reason)
            )

    def permission_to_move(
        self, peer: Identity, guest: GuestNames, *, what: str, source: str, to: str
    ) -> Permission:
        """Tell whether an operator might move a guest that is only looked at. No line: nothing was asked for."""
        verdict = self._policy.decide(peer, Action.MOVE, what=what, guest=guest, source=source, to=to)
        return Permission(who=str(peer), is_allowed=verdict.is_allowed, reason=verdict.reason)

    def guests_for(self, peer: Identity, guests: Iterable[GuestFacts]) -> tuple[GuestFacts, ...]:
        """Give those of the guests that the peer may see."""
        return tuple(
            facts
            for facts in guests
            if self._policy.decide(
                peer, Action.GUESTS, guest=GuestNames(name=facts.name, guest_id=facts.guest_id)
            ).is_allowed
        )

    def jobs_for(self, peer: Identity, jobs: Iterable[JobView]) -> tuple[JobView, ...]:
        """Give those of the jobs whose guests the peer may see."""
        return tuple(
            view
            for view in jobs
            if self._policy.decide(
                peer, Action.JOBS, guest=GuestNames(name=view.guest_name, guest_id=view.guest_id)
            ).is_allowed
        )


def names_among(guests: Iterable[GuestFacts], word: str) -> GuestNames:
    """Find which guest an operator means; one that is not there, or is not the only one, is as unknown."""
    found = [facts for facts in guests if word in (facts.guest_id, facts.name)]
    return GuestNames(name=found[0].name, guest_id=found[0].guest_id) if len(found) == 1 else UNKNOWN_GUEST
