"""`migrate.ports.HostSurvey` for this host."""

from __future__ import annotations

import time

from migrate.facts import GuestFacts, Survey

__all__ = ["HostSurveyor"]


class HostSurveyor:
    """Looks at this host; all that blocks is done in worker threads."""

    async def survey(self, guest: GuestFacts) -> Survey:
        """Look at this host with such a guest in mind; changes nothing."""
        return Survey(at_s=time.time())
