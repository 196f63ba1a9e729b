"""Every case with real agents. Slow: each makes two of them, and a guest."""

from __future__ import annotations

import pytest

from tests.agents.host.fleet import scratch_folder
from tests.preflight.cases import Case, Outcome
from tests.preflight.matrix import all_cases
from tests.preflight.needs import NotHere
from tests.preflight.stage import Build

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.mark.dealt
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.area}: {case.name}")
async def test_a_case_gives_the_findings_that_it_must(case: Case, anyio_backend_name: str) -> None:
    with scratch_folder() as folder:
        try:
            report = await case.play(Build(folder, anyio_backend_name))
        except NotHere as exc:
            pytest.skip(str(exc))
    outcome = Outcome.of(report)
    assert not outcome.mistake(case), [one for one in report.findings if one.check in outcome.refused]
