"""`migrate.ports.HostSurvey` for this host."""

from __future__ import annotations

import time

from agents.survey.capacity import CapacitySurveyor
from agents.survey.security import SecuritySurveyor
from migrate.facts import GuestFacts, Survey

__all__ = ["HostSurveyor"]


class HostSurveyor:
    """Looks at this host; all that blocks is done in worker threads."""

    def __init__(self, *, capacity: CapacitySurveyor, security: SecuritySurveyor) -> None:
        self._capacity = capacity
        self._security = security

    async def survey(self, guest: GuestFacts) -> Survey:
        """Look at this host with such a guest in mind; changes nothing."""
        capacity = await self._capacity.survey(guest.guest_id)
        security = await self._security.survey(guest)
        # The clock last: a source asks the other end right after this, which compares it with its own.
        return Survey(at_s=time.time(), capacity=capacity, security=security)
