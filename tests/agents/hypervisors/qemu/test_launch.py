"""A QEMU that does not get as far as it should when it is started."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from agents.hypervisors.qemu import launch
from agents.hypervisors.qemu.allowed import QemuHost
from agents.hypervisors.qemu.errors import QemuGone
from agents.hypervisors.qemu.spec import Accel, DiskSpec, Format
from tests.agents.hypervisors.qemu.conftest import GUEST_ID, PLAIN, QEMU, needs_qemu

pytestmark = [pytest.mark.anyio, needs_qemu()]


@pytest.mark.parametrize("is_incoming", [False, True])
async def test_one_that_waits_for_a_silent_server_is_ended_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_incoming: bool
) -> None:
    monkeypatch.setattr(launch, "START_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"nbd://127.0.0.1:{server.getsockname()[1]}/guest-1"
        host = QemuHost(
            dir=tmp_path / "q", binary=QEMU, shared_dirs=(), accels=(Accel.TCG,), network_disks=(url,)
        )
        spec = replace(PLAIN, disks=(DiskSpec(path=url, format=Format.RAW),))
        with pytest.raises(QemuGone, match=f"did not start within 1 s: .* at {url},"):
            await launch.launch(spec, host, is_incoming=is_incoming)
    assert processes_of(GUEST_ID) == []
    assert {path.suffix for path in (tmp_path / "q").iterdir()} <= {".log"}


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
