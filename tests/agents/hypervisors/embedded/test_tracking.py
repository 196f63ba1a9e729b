from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from agents.hypervisors.embedded import tracking
from agents.hypervisors.embedded.client import GuestClient
from agents.hypervisors.embedded.errors import GuestGone
from agents.hypervisors.embedded.tracking import FORCE_HOOK_VARIABLE, WriteHookTracker, choose_tracker
from memory.dirty import TrackerSupport
from memory.errors import TrackerError

PAGES = 11


class FakeClient:
    """A guest whose write hook gives `bitmap`, or that has ended when it is None."""

    pid = 1

    def __init__(self, bitmap: bytes | None) -> None:
        self.bitmap = bitmap
        self.hooks = 0

    def start_hook(self) -> None:
        self.hooks += 1

    def harvest_hook(self) -> bytes:
        if self.bitmap is None:
            raise GuestGone("it has ended")
        return self.bitmap

    def stop_hook(self) -> None:
        self.hooks -= 1
        if self.bitmap is None:
            raise GuestGone("it has ended")


def hook(bitmap: bytes | None) -> tuple[WriteHookTracker, FakeClient]:
    client = FakeClient(bitmap)
    return WriteHookTracker(cast(GuestClient, client), PAGES), client


def test_a_bitmap_becomes_runs() -> None:
    bits = np.zeros(PAGES, bool)
    bits[[0, 1, 2, 9, 10]] = True
    tracker, _ = hook(np.packbits(bits, bitorder="little").tobytes())
    tracker.start()
    assert tracker.harvest().tolist() == [[0, 3], [9, 2]]


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_bitmap_of_another_size_is_an_error(length: int) -> None:
    tracker, _ = hook(bytes(length))
    tracker.start()
    with pytest.raises(TrackerError, match=f"{length} bytes"):
        tracker.harvest()


def test_a_guest_that_has_ended_is_a_tracker_error_and_can_be_stopped() -> None:
    tracker, _ = hook(None)
    tracker.start()
    with pytest.raises(TrackerError, match="ended"):
        tracker.harvest()
    tracker.stop()


def test_stopping_twice_takes_the_hook_away_once() -> None:
    tracker, client = hook(bytes(2))
    tracker.stop()
    tracker.start()
    tracker.stop()
    tracker.stop()
    assert client.hooks == 0


@pytest.mark.parametrize(
    ("forced", "kernel_can", "method"),
    [("1", True, "write-hook"), ("", True, "uffd-wp"), ("", False, "write-hook"), ("1", False, "write-hook")],
)
def test_the_kernel_s_log_is_taken_where_there_is_one_and_the_choice_is_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    forced: str,
    kernel_can: bool,
    method: str,
) -> None:
    monkeypatch.setenv(FORCE_HOOK_VARIABLE, forced)
    support = TrackerSupport(uffd_wp=kernel_can, soft_dirty=False, problems=("too old",))
    monkeypatch.setattr(tracking, "_kernel", lambda: support)
    with caplog.at_level("INFO"):
        assert choose_tracker(cast(GuestClient, FakeClient(b"")), PAGES).method == method
    assert f"method={method}" in caplog.text
