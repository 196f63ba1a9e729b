from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from agents.api import CONTROL_SCHEMA, JobView, Watch
from agents.audit import AuditFile
from agents.authorization import AccessPolicy, AccessRule, Right
from agents.host.audittrail import AuditTrail
from agents.host.control import ControlService
from agents.host.gate import Gate
from agents.host.jobs import Job, JobTable
from agents.metrics import AgentMetrics
from migrate.phases import Phase
from tests.faults import Fuse, fused_stream_pair
from transport.tls import Identity, Role
from transport.wire import MessageChannel

pytestmark = pytest.mark.anyio


class EndsWhileItIsTold(MessageChannel):
    """A channel on which the job changes and ends while a view of it is being sent."""

    job: Job

    async def send(self, message: object) -> None:
        await super().send(message)
        if isinstance(message, JobView) and not message.has_ended:
            self.job.phase_changed(Phase.SETUP, Phase.ROLLED_BACK, "it was quick")
            self.job.ended(None)


async def test_an_end_that_comes_while_a_view_is_sent_is_told(tmp_path: Path) -> None:
    metrics = AgentMetrics("host-b", "0")
    rule = AccessRule(key="allow[0]", role=Role.OPERATOR, names=("tester",), may=frozenset({Right.VIEW}))
    job = Job(
        job_id="0" * 32,
        guest_id="guest-1",
        guest_name="worker",
        source="host-a",
        destination="host-b",
        is_outgoing=False,
        metrics=AgentMetrics("host-b", "0"),
    )
    jobs = JobTable()
    jobs.add(job)
    service = ControlService(
        outgoing=None,  # type: ignore[arg-type]  # a watch needs the jobs alone
        incoming=None,  # type: ignore[arg-type]
        recovery=None,  # type: ignore[arg-type]
        host_view=None,  # type: ignore[arg-type]
        jobs=jobs,
        gate=Gate(
            AccessPolicy(host="host-b", rules=(rule,)), AuditTrail(AuditFile(tmp_path / "audit"), metrics)
        ),
    )
    near, far = fused_stream_pair(Fuse())
    channel = EndsWhileItIsTold(far, CONTROL_SCHEMA)
    channel.job = job
    operator = MessageChannel(near, CONTROL_SCHEMA)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.serve, channel, Identity(role=Role.OPERATOR, name="tester"))
        with anyio.fail_after(5):
            await operator.send(Watch(job=job.job_id))
            views = [await operator.receive(), await operator.receive()]
        assert [view.has_ended for view in views if isinstance(view, JobView)] == [False, True]
        await operator.aclose()
