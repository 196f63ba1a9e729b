from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from agents import metrics
from agents.metrics import AgentMetrics, Direction
from migrate.phases import Phase
from migrate.stats import DowntimeParts, PageCounts, Progress, Report

PARTS = DowntimeParts(pause_s=0.001, last_pages_s=0.002, device_state_s=0.0005, load_s=0.0015, resume_s=0.001)


def report(phase: Phase = Phase.COMPLETE, downtime: DowntimeParts | None = PARTS) -> Report:
    return Report(
        phase=phase,
        guest_id="g-1",
        guest_name="web",
        source="host-a",
        destination="host-b",
        runs_on="host-b",
        error=None,
        total_s=3.5,
        downtime=downtime,
        rounds=(),
        counts=PageCounts(),
        ram_bytes=1 << 30,
        wire_bytes=1000,
        resent_bytes=0,
        link_breaks=0,
        tracking="uffd-wp",
        source_digest=None,
        destination_digest=None,
    )


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def agent(clock: Clock) -> AgentMetrics:
    return AgentMetrics("host-a", "0.1.0", now_s=clock)


def samples(agent: AgentMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(agent.render().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(agent: AgentMetrics, name: str, **labels: str) -> float | None:
    return samples(agent).get((name, frozenset(labels.items())))


def jobs(agent: AgentMetrics) -> set[str]:
    return {dict(labels)["job"] for _, labels in samples(agent) if "job" in dict(labels)}


def test_every_figure_of_a_running_migration_is_shown(agent: AgentMetrics) -> None:
    observer = agent.observe("j-1", "web", Direction.OUTGOING)
    observer.progressed(
        Progress(
            phase=Phase.PRECOPY,
            round_number=3,
            dirty_pages=40,
            remaining_pages=7,
            counts=PageCounts(zero_pages=1, raw_pages=2, zstd_pages=3),
            wire_bytes=5000,
            resent_bytes=600,
            link_breaks=2,
            wire_rate_bytes_per_s=1e6,
            dirty_rate_pages_per_s=250.0,
            predicted_downtime_s=0.006,
            is_paused=True,
        )
    )
    mine = {"job": "j-1", "guest": "web", "direction": "outgoing"}
    expected = {
        "round": 3,
        "dirty_pages": 40,
        "remaining_pages": 7,
        "wire_bytes_total": 5000,
        "resent_bytes_total": 600,
        "link_breaks_total": 2,
        "wire_rate_bytes_per_second": 1e6,
        "dirty_rate_pages_per_second": 250,
        "predicted_downtime_seconds": 0.006,
        "is_paused": 1,
    }
    assert {name: value(agent, f"vmferry_migration_{name}", **mine) for name in expected} == expected
    assert value(agent, "vmferry_migration_phase", phase="precopy", **mine) == 1
    for kind, count in (("zero", 1), ("raw", 2), ("zstd", 3)):
        assert value(agent, "vmferry_migration_pages_total", kind=kind, **mine) == count
    assert value(agent, "vmferry_migrations_running", direction="outgoing") == 1


def test_a_phase_is_shown_before_its_first_progress(agent: AgentMetrics) -> None:
    observer = agent.observe("j-1", "web", Direction.OUTGOING)
    observer.phase_changed(Phase.SETUP, Phase.PREFLIGHT, "both ends are ready")
    mine = {"job": "j-1", "guest": "web", "direction": "outgoing"}
    assert value(agent, "vmferry_migration_phase", phase="preflight", **mine) == 1
    assert value(agent, "vmferry_migration_phase", phase="setup", **mine) is None


def test_an_ended_migration_shows_its_downtime_and_parts(agent: AgentMetrics) -> None:
    agent.observe("j-1", "web", Direction.OUTGOING)
    agent.ended("j-1", report())
    mine = {"job": "j-1", "guest": "web", "direction": "outgoing"}
    assert value(agent, "vmferry_migration_downtime_seconds", **mine) == pytest.approx(0.006)
    assert value(agent, "vmferry_migration_downtime_part_seconds", part="load", **mine) == 0.0015
    assert value(agent, "vmferry_migration_total_seconds", **mine) == 3.5
    assert value(agent, "vmferry_migration_phase", phase="complete", **mine) == 1
    assert value(agent, "vmferry_migrations_running", direction="outgoing") == 0
    assert value(agent, "vmferry_migrations_total", direction="outgoing", outcome="complete") == 1
    assert value(agent, "vmferry_downtime_seconds_count") == 1


@pytest.mark.parametrize(
    ("direction", "phase", "downtime"),
    [
        (Direction.INCOMING, Phase.COMPLETE, PARTS),
        (Direction.OUTGOING, Phase.ROLLED_BACK, PARTS),
        (Direction.OUTGOING, Phase.COMPLETE, None),
    ],
)
def test_only_completed_outgoing_migrations_count_downtime(
    agent: AgentMetrics, direction: Direction, phase: Phase, downtime: DowntimeParts | None
) -> None:
    agent.observe("j-1", "web", direction)
    agent.ended("j-1", report(phase, downtime))
    assert value(agent, "vmferry_downtime_seconds_count") == 0


def test_a_job_that_ends_twice_counts_once(agent: AgentMetrics) -> None:
    agent.observe("j-1", "web", Direction.OUTGOING)
    agent.ended("j-1", report())
    agent.ended("j-1", report())
    assert value(agent, "vmferry_migrations_total", direction="outgoing", outcome="complete") == 1


def test_only_the_last_ended_migrations_are_kept(agent: AgentMetrics) -> None:
    for number in range(metrics.MAX_ENDED + 1):
        agent.observe(f"j-{number}", "web", Direction.OUTGOING)
        agent.ended(f"j-{number}", report())
    assert jobs(agent) == {f"j-{number}" for number in range(1, metrics.MAX_ENDED + 1)}


def test_ended_migrations_go_after_their_time(agent: AgentMetrics, clock: Clock) -> None:
    agent.observe("ended", "web", Direction.OUTGOING)
    agent.observe("running", "web", Direction.INCOMING)
    agent.ended("ended", report())
    clock.now_s = metrics.KEEP_ENDED_S - 1
    assert jobs(agent) == {"ended", "running"}
    clock.now_s = metrics.KEEP_ENDED_S
    assert jobs(agent) == {"running"}


def test_the_worst_lateness_of_the_loop_is_kept(agent: AgentMetrics) -> None:
    for lateness_s in (0.001, 0.03, 0.002):
        agent.loop_was_late(lateness_s)
    assert value(agent, "vmferry_loop_lateness_worst_seconds") == 0.03
    assert value(agent, "vmferry_loop_lateness_seconds_bucket", le="0.02") == 2


def test_certificates_and_draining_are_shown(agent: AgentMetrics) -> None:
    agent.set_certificate("own", datetime(2030, 1, 1, tzinfo=UTC))
    agent.set_draining(True)
    shown = value(agent, "vmferry_certificate_expiry_timestamp_seconds", certificate="own")
    assert shown == datetime(2030, 1, 1, tzinfo=UTC).timestamp()
    assert value(agent, "vmferry_agent_is_draining") == 1


def test_the_process_is_shown(agent: AgentMetrics) -> None:
    assert (value(agent, "process_resident_memory_bytes") or 0) > 0


def test_every_name_is_ours_or_a_standard_one(agent: AgentMetrics) -> None:
    names = {name for name, _ in samples(agent)}
    assert {name for name in names if not name.startswith(("vmferry_", "process_", "python_info"))} == set()


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=200), st.text(max_size=200))
def test_no_name_from_elsewhere_breaks_the_page(job: str, guest: str) -> None:
    agent = AgentMetrics("host-a", "0.1.0")
    agent.observe(job, guest, Direction.INCOMING)
    assert len(jobs(agent)) == 1
