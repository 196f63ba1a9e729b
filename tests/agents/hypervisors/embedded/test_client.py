from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from agents.hypervisors.embedded.client import Description, GuestClient, launch_guest, start_guest
from agents.hypervisors.embedded.errors import GuestGone, RequestRefused
from agents.hypervisors.embedded.rundir import GuestPaths
from tests.agents.hypervisors.embedded.conftest import GUEST_ID, SpecMaker

# Each starts a process, which takes 0.2 s.
pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[4]


def describe(run_dir: Path) -> Description:
    with closing(GuestClient(GuestPaths.of_guest(run_dir, GUEST_ID).socket)) as client:
        return client.describe()


def test_a_guest_outlives_whoever_started_it_and_obeys_only_sigterm(
    run_dir: Path, make_spec: SpecMaker
) -> None:
    guests_dir = run_dir / "guests"
    starter = (
        "import sys, pathlib; from agents.hypervisors.embedded.client import start_guest;"
        "from agents.hypervisors.embedded.spec import EmbeddedSpec;"
        "print(start_guest(EmbeddedSpec.from_bytes(bytes.fromhex(sys.argv[1])), pathlib.Path(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", starter, make_spec().to_bytes().hex(), str(guests_dir)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
        start_new_session=True,
    )
    described = describe(guests_dir)
    assert described.pid == int(done.stdout)
    assert described.is_running
    assert os.getsid(described.pid) not in (os.getsid(0), 0)
    os.kill(described.pid, signal.SIGINT)
    os.kill(described.pid, signal.SIGHUP)
    assert describe(guests_dir).is_running
    with closing(GuestClient(GuestPaths.of_guest(guests_dir, GUEST_ID).socket)) as client:
        os.kill(described.pid, signal.SIGTERM)
        client.await_end()
    assert [entry.name for entry in guests_dir.iterdir()] == [f"{GUEST_ID}.log"]


def test_one_identity_runs_once_and_a_killed_guest_is_in_nobody_s_way(
    run_dir: Path, make_spec: SpecMaker
) -> None:
    pid = start_guest(make_spec(), run_dir / "guests")
    with pytest.raises(RequestRefused, match="already"):
        start_guest(make_spec(), run_dir / "guests")
    with closing(GuestClient(GuestPaths.of_guest(run_dir / "guests", GUEST_ID).socket)) as client:
        os.kill(pid, signal.SIGKILL)
        client.await_end()
        with pytest.raises(GuestGone):
            client.describe()
    assert start_guest(make_spec(), run_dir / "guests") != pid


def test_an_incoming_guest_ends_when_its_agent_does(run_dir: Path, make_spec: SpecMaker) -> None:
    client = launch_guest(make_spec(), run_dir / "guests", is_incoming=True)
    assert client.describe().is_incoming
    with closing(GuestClient(GuestPaths.of_guest(run_dir / "guests", GUEST_ID).socket)) as witness:
        client.close()
        witness.await_end()


def test_a_guest_that_cannot_start_says_why(run_dir: Path, make_spec: SpecMaker) -> None:
    with pytest.raises(GuestGone, match="is the shared storage mounted"):
        start_guest(make_spec(disk_path=str(run_dir / "none")), run_dir / "guests")
    assert {entry.suffix for entry in (run_dir / "guests").iterdir()} == {".log"}


def test_a_guest_that_hangs_is_killed_when_it_must_end(
    run_dir: Path, make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = start_guest(make_spec(), run_dir / "guests")
    monkeypatch.setattr("agents.hypervisors.embedded.client.END_TIMEOUT_S", 0.5)
    with closing(GuestClient(GuestPaths.of_guest(run_dir / "guests", GUEST_ID).socket)) as client:
        os.kill(pid, signal.SIGSTOP)
        client.await_end()


def test_a_person_can_start_a_guest_in_the_foreground(run_dir: Path) -> None:
    toml = run_dir / "web.toml"
    toml.write_text(f'id = "{GUEST_ID}"\nram = "2MiB"\nmax_instructions = 1000\n')
    socket_path = run_dir / f"{GUEST_ID}.sock"
    command = [
        sys.executable,
        "-m",
        "agents.hypervisors.embedded",
        "--socket",
        str(socket_path),
        "--spec",
        str(toml),
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE) as process:
        while not socket_path.exists() and process.poll() is None:
            pass
        with closing(_connect(socket_path)) as client:
            assert client.describe().spec.name == "web"
            client.quit()
        _, log = process.communicate(timeout=10)
        assert process.returncode == 0
    assert b"ended state=running" in log
    toml.write_text("ram = 1\n")
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: the guest's spec cannot be used: ram:")


def _connect(socket_path: Path) -> GuestClient:
    """Between the socket's name and its `listen` lies a moment in which nobody answers."""
    while True:
        try:
            return GuestClient(socket_path)
        except GuestGone:
            continue
