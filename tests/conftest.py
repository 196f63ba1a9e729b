"""Every async test runs on both event loops: asyncio in debug mode, and trio.

Law: only what every package's tests need. A fixture of one package lives in that package's folder.

The cases of a test with real machines take seconds each. Where it is marked `dealt`, its cases are dealt out: the first
runs on asyncio, the second on trio, and so on; a test of one case runs on both. In a module that is marked
`dealt("module")` its tests are dealt out like that among each other: what they show is of QEMU, the kernel and the
storage, and loops are shown by others.

A test that skips because something is missing that can be installed or granted says so, beginning with "needs". Where
`VMFERRY_NEEDS=must` is set, as CI does, such a skip is a failure.

CI runs a test that has failed once more (`--reruns 1` in tox.ini): some need a real machine to have time for them. Its
failure is printed in full nevertheless, as a defect to be looked for, and more than a few of them fail the run. One
that shows a guest lost or doubled is a failure at once.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Final

import pytest

# Neighbours of a shared machine take its time from one test or two of a run of five thousand.
MAX_REPEATED_TESTS: Final = 3
# What these find once in a hundred runs is what they are for.
NEVER_REPEATED: Final = ("tests/reliability/", "tests/model/", "tests/sim/", "tests/fuzz/", "tests/nfs/")
LOOPS: Final = ("asyncio", "trio")
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let no second run hide what proves that nothing is lost, and deal out the cases of tests that ask for it."""
    for item in items:
        if item.nodeid.startswith(NEVER_REPEATED):
            item.add_marker(pytest.mark.flaky(reruns=0))
    left_out = _left_out(items)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of tests that are dealt out, the cases that are another loop's turn. One asked for by its name alone stays."""
    cases: dict[str, dict[str, dict[str, pytest.Item]]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("dealt"):
            test, _, parameters = item.nodeid.removesuffix("]").partition("[")
            loop = next(name for name in parameters.split("-") if name in LOOPS)
            case = test + "-".join(part for part in parameters.split("-") if part != loop)
            if any("module" in marker.args for marker in item.iter_markers("dealt")):
                test = item.nodeid.partition("::")[0]
            cases.setdefault(test, {}).setdefault(case, {})[loop] = item
    left_out: set[pytest.Item] = set()
    for of_one_test in cases.values():
        if len(of_one_test) > 1:
            for number, loops in enumerate(of_one_test.values()):
                if len(loops) > 1:
                    del loops[LOOPS[number % len(LOOPS)]]
                    left_out.update(loops.values())
    return left_out


def _repeated(config: pytest.Config) -> list[pytest.TestReport]:
    """The failures of tests that were run once more."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    return terminal.stats.get("rerun", []) if isinstance(terminal, pytest.TerminalReporter) else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what failed at first."""
    repeated = _repeated(config)
    for report in repeated:
        terminalreporter.section(f"failed, and was run once more: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)
        for name, content in report.sections:
            terminalreporter.section(name, "-")
            terminalreporter.write_line(content)
    if len(repeated) > MAX_REPEATED_TESTS:
        terminalreporter.section(f"{len(repeated)} tests failed at first, {MAX_REPEATED_TESTS} may", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run in which more tests failed at first than a busy machine explains."""
    if len(_repeated(session.config)) > MAX_REPEATED_TESTS and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
