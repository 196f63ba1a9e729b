"""What a table of jobs says of room for one more migration."""

from __future__ import annotations

import itertools

from agents.config import LimitSettings
from agents.host.jobs import Job, JobTable
from agents.metrics import AgentMetrics
from migrate.facts import MoveSlots
from migrate.phases import Phase

LIMITS = LimitSettings(
    outgoing=3,
    incoming=5,
    connections=1,
    window_bytes=4 << 20,
    delta_cache_bytes=0,
    bandwidth_bytes_per_s=None,
    outage_s=1.0,
    dead_peer_s=1.0,
    memory_overcommit=1.0,
    cpu_overcommit=1.0,
)


def test_a_guest_s_own_migration_is_none_of_the_others() -> None:
    table, metrics = JobTable(), AgentMetrics("host-a", "0")

    def begin(guest_id: str, *, is_outgoing: bool) -> Job:
        job = Job(
            job_id=f"{guest_id}-{is_outgoing}",
            guest_id=guest_id,
            guest_name=guest_id,
            source="host-a",
            destination="host-b",
            is_outgoing=is_outgoing,
            metrics=metrics,
        )
        table.add(job)
        return job

    def slots(guest_id: str, *, is_draining: bool = False) -> MoveSlots:
        return table.slots_besides(guest_id, LIMITS, is_draining=is_draining)

    none = slots("a", is_draining=True)
    assert none == MoveSlots(
        incoming=0,
        incoming_limit=5,
        outgoing=0,
        outgoing_limit=3,
        is_draining=True,
        is_coming=False,
        is_leaving=False,
    )
    leaving = begin("a", is_outgoing=True)
    begin("b", is_outgoing=True)
    begin("c", is_outgoing=False)
    of_a, of_c, of_d = slots("a"), slots("c"), slots("d")
    assert (of_a.outgoing, of_a.incoming, of_a.is_leaving, of_a.is_coming) == (1, 1, True, False)
    assert (of_c.outgoing, of_c.incoming, of_c.is_leaving, of_c.is_coming) == (2, 0, False, True)
    assert (of_d.outgoing, of_d.incoming, of_d.is_leaving, of_d.is_coming) == (2, 1, False, False)
    # What nobody works on any more takes no place either, but it is not over.
    doubtful = begin("e", is_outgoing=False)
    for old, new in itertools.pairwise(
        (Phase.SETUP, Phase.PRECOPY, Phase.STOP, Phase.SWITCHOVER, Phase.IN_DOUBT)
    ):
        doubtful.phase_changed(old, new, "")
    assert slots("e").in_doubt_job == ""
    doubtful.ended(None)
    assert (slots("e").in_doubt_job, slots("e").is_coming) == (doubtful.job_id, False)
    assert slots("d").in_doubt_job == ""
    # What has ended takes no place.
    leaving.ended(None)
    assert (slots("d").outgoing, slots("a").is_leaving) == (1, False)
