from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from agents.cli.main import main
from agents.cli.output import Exit
from agents.demo import selftest
from agents.demo.errors import NoQemu
from memory.runs import Runs, empty_runs
from memory.uffd_wp import UffdWpTracker
from tests.agents.hypervisors.qemu.conftest import needs_qemu

CHECKS = ["kernel", "qemu", "guest", "injection", "tracking", "drain", "holes", "move"]


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    return {one["name"]: (one["state"], one["saw"]) for one in json.loads(capsys.readouterr().out)}


@pytest.mark.slow
@needs_qemu()
def test_every_check_is_tried_with_the_real_thing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--json"]) == Exit.OK
    seen = states(capsys)
    assert list(seen) == CHECKS
    assert {state for state, _ in seen.values()} == {"ok"}
    assert "none of 65536 pages stale" in seen["tracking"][1]
    assert "its RAM equal to the byte" in seen["move"][1]


@pytest.mark.slow
@needs_qemu()
def test_a_log_that_misses_writes_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest: Callable[[UffdWpTracker], Runs] = UffdWpTracker.harvest

    def forgetful(self: UffdWpTracker) -> Runs:
        runs = harvest(self)
        return runs[: len(runs) // 2] if len(runs) > 1 else empty_runs()

    monkeypatch.setattr(UffdWpTracker, "harvest", forgetful)
    assert main(["selftest", "--json"]) == Exit.REFUSED
    seen = states(capsys)
    assert seen["tracking"][0] == "failed"
    assert "pages differ that the log did not have" in seen["tracking"][1]
    assert seen["move"] == ("not tried", "an earlier check failed")


def test_without_qemu_it_says_so_and_tries_what_it_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> object:
        raise NoQemu("there is no QEMU here; Debian: apt-get install qemu-system-x86")

    monkeypatch.setattr(selftest, "find_qemu", missing)
    assert main(["selftest"]) == Exit.REFUSED
    out = capsys.readouterr().out
    assert "apt-get install qemu-system-x86" in out
    assert out.count("not tried") == len(CHECKS) - 2
