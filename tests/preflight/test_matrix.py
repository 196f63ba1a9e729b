"""Every case with real agents. Slow: each makes two of them, and a guest."""

from __future__ import annotations

import pytest

from tests.agents.host.fleet import scratch_folder
from tests.needs import skipped_where_not_here
from tests.preflight.cases import Case, Outcome
from tests.preflight.matrix import all_cases
from tests.preflight.stage import Build

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.mark.dealt
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.area}: {case.name}")
async def test_a_case_gives_the_findings_that_it_must(case: Case, anyio_backend_name: str) -> None:
    with scratch_folder() as folder, skipped_where_not_here():
        report = await case.play(Build(folder, anyio_backend_name))
    outcome = Outcome.of(report)
    assert not outcome.mistake(case), [one for one in report.findings if one.check in outcome.refused]
