"""Every async test runs on both event loops: asyncio in debug mode, and trio.

Law: only what every package's tests need. A fixture of one package lives in that package's folder.

A test that skips because something is missing that can be installed or granted says so, beginning with "needs". Where
`VMFERRY_NEEDS=must` is set, as CI does, such a skip is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Final

import pytest

NEEDS_MUST_BE_MET: Final = os.environ.get("VMFERRY_NEEDS") == "must"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip for want of something into a failure, where it must be there."""
    report = yield
    if NEEDS_MUST_BE_MET and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith("needs "):
            report.outcome, report.longrepr = "failed", f"must not be skipped here: {reason}"
    return report


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    """Name an event loop and its options, for AnyIO's pytest plugin.

    Time is real on both: a test that must wait long in virtual time asks for trio's MockClock itself,
    because an autojumping clock would also jump while worker threads and sockets are busy.
    """
    backend: tuple[str, dict[str, object]] = request.param
    return backend
