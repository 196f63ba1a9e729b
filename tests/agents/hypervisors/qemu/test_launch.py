"""A QEMU that does not get as far as it should when it is started."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from agents.hypervisors.qemu import launch
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.errors import QemuGone
from agents.hypervisors.qemu.spec import Accel, DiskSpec, Format
from tests.agents.hypervisors.qemu.conftest import GUEST_ID, PLAIN, QEMU, needs_qemu
from tests.waiting import until

pytestmark = [pytest.mark.anyio, needs_qemu()]


@pytest.mark.parametrize("is_incoming", [False, True])
async def test_one_that_waits_for_a_silent_server_is_ended_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_incoming: bool
) -> None:
    monkeypatch.setattr(launch, "START_TIMEOUT_S", 1.0)
    with silent_server() as url, pytest.raises(QemuGone, match=f"did not start within 1 s: .* at {url},"):
        await start(tmp_path, url, is_incoming=is_incoming)
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("is_incoming", [False, True])
async def test_whoever_gives_up_is_not_kept_by_one_that_waits(tmp_path: Path, is_incoming: bool) -> None:
    with silent_server() as url, anyio.fail_after(launch.START_TIMEOUT_S / 2):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: start(tmp_path, url, is_incoming=is_incoming))
            # It has written its number, and waits for the server.
            await until(lambda: list((tmp_path / "q").glob("*.pid")), "a QEMU that is being started")
            tasks.cancel_scope.cancel()
    assert_nothing_is_left(tmp_path)


async def test_one_that_is_not_ended_in_time_by_itself_is_killed(tmp_path: Path) -> None:
    """As one does not end while the library of a disk server keeps it; this one is stopped."""
    host = QemuHost(dir=tmp_path / "q", binary=QEMU, shared_dirs=(), accels=(Accel.TCG,))
    qmp, paths = await launch.launch(PLAIN, host, is_incoming=True)
    process = launch.Process(qmp.peer_pid)
    os.kill(process.pid, signal.SIGSTOP)
    with anyio.fail_after(launch.UNUSED_CLOSES_WITHIN_S):
        await launch.end(qmp, process, paths, closes_within_s=0.2)
    process.close()
    await qmp.aclose()
    assert_nothing_is_left(tmp_path)


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a disk whose server takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"nbd://127.0.0.1:{server.getsockname()[1]}/guest-1"


async def start(folder: Path, url: str, *, is_incoming: bool) -> None:
    host = QemuHost(dir=folder / "q", binary=QEMU, shared_dirs=(), accels=(Accel.TCG,), network_disks=(url,))
    spec = replace(PLAIN, disks=(DiskSpec(path=url, format=Format.RAW),))
    await launch.launch(spec, host, is_incoming=is_incoming)


def assert_nothing_is_left(folder: Path) -> None:
    assert processes_of(GUEST_ID) == []
    assert {path.suffix for path in (folder / "q").iterdir()} <= {".log"}


def processes_of(word: str) -> list[str]:
    """The command lines of this machine's processes that have a word in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if word in line:
            found.append(line)
    return found
