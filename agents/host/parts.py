"""What the parts of a host agent share.

Law: references only; whoever changes one of these things says so in its own module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agents.config import Settings
from agents.host.jobs import JobTable
from agents.metrics import AgentMetrics
from migrate.ports import HostSurvey, Hypervisor, SharedStorage

__all__ = ["HostParts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostParts:
    """One host's settings, guests, shared storage, what is seen of the host itself, jobs and figures."""

    settings: Settings
    hypervisors: Mapping[str, Hypervisor]
    storage: SharedStorage
    survey: HostSurvey
    jobs: JobTable
    metrics: AgentMetrics
