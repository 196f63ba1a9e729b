"""Ownership records on a file system whose server dies, comes back and stands still, at each operation of a claim.

The server is bindfs, a stand-in for an NFS server: the kernel's errors are real (ENOTCONN, calls that hang until it
goes on or is killed), those of NFS (ESTALE) are not among them; `tests.nfs` has those.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from agents.ownership import fileops
from agents.ownership.files import OWNERSHIP_DIR, FileRecords
from agents.storage import SharedDirs
from migrate.ownership import Ownership
from migrate.phases import Phase
from tests.agents.host.fleet import HOSTS, Fleet, report_of, running_fleet, scratch_folder
from tests.agents.host.test_killed import is_running
from tests.agents.takeover import (
    GUEST,
    OUTCOMES,
    Interrupted,
    both_ask,
    mistakes,
    outcome_of,
    record,
    take_over,
)
from tests.waiting import LOOK_EVERY_S, delay, looks, until, until_blocking

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.dealt,
]

MOUNTS_WITHIN_S = 10.0
DOWN_S = 2.0
# For each call, where agents have 20 s.
TIMEOUT_S = 0.5


class Fault(StrEnum):
    """What becomes of the server just before an operation."""

    KILLED = "killed"
    # A new one serves the rest.
    FAILS_OVER = "fails-over"
    FROZEN = "frozen"


@dataclass
class Server:
    """A file system at `mounted` that shows `backing`. Every method blocks."""

    backing: Path
    mounted: Path
    process: subprocess.Popen[bytes] | None = None
    is_frozen: bool = False

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["bindfs", "-f", str(self.backing), str(self.mounted)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until_blocking(self.mounted.is_mount, "a mount by bindfs", within_s=MOUNTS_WITHIN_S)

    def kill(self) -> None:
        """End it without warning: what it showed says ENOTCONN from now on."""
        process, self.process, self.is_frozen = self.process, None, False
        if process is not None:
            process.kill()
            process.wait()

    def freeze(self) -> None:
        """From now on every call hangs."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)
            self.is_frozen = True

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.mounted)], check=False, capture_output=True)

    def fail_over(self) -> None:
        self.kill()
        self.unmount()
        self.start()

    def heal(self) -> None:
        """Have a server that answers: the frozen one goes on with what it was asked."""
        if self.is_frozen and self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.is_frozen = False
        elif self.process is None:
            self.fail_over()


@contextmanager
def serving(backing: Path, mounted: Path) -> Iterator[Server]:
    """A server that ends with the block."""
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("this machine has no FUSE")
    if shutil.which("bindfs") is None:
        pytest.skip("needs bindfs (Debian: apt-get install bindfs)")
    for folder in (backing, mounted):
        folder.mkdir(parents=True, exist_ok=True)
    server = Server(backing, mounted)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        server.unmount()


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_server_that_fails_at_any_operation_of_a_claim_makes_one_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    with serving(tmp_path / "backing", tmp_path / "mounted") as server:
        directory = str(server.mounted / OWNERSHIP_DIR)
        other, others = SharedDirs([server.backing]), str(server.backing / OWNERSHIP_DIR)
        strikes = {
            Fault.KILLED: server.kill,
            Fault.FAILS_OVER: server.fail_over,
            Fault.FROZEN: server.freeze,
        }
        quiet = Interrupted(-1, server.kill)
        await other.claim(others, record(1, "host-a"))
        monkeypatch.setattr(fileops, "os", quiet)
        assert await take_over(SharedDirs([server.mounted]), directory) == (record(2, "host-b"), [])
        counts = dict.fromkeys(OUTCOMES, 0)
        for at in range(len(quiet.calls)):
            monkeypatch.setattr(fileops, "os", os)
            shutil.rmtree(others)
            await run_sync(server.fail_over)  # with nothing remembered of the trial before
            await other.claim(others, record(1, "host-a"))
            storage = SharedDirs([server.mounted], timeout_s=TIMEOUT_S)
            monkeypatch.setattr(fileops, "os", Interrupted(at, strikes[fault]))
            believed, failures = await take_over(storage, directory)
            monkeypatch.setattr(fileops, "os", os)
            if fault is Fault.FROZEN and at % 2:
                # The other half of them hang until the server is gone.
                await run_sync(server.kill)
            await run_sync(server.heal)
            # The source asks at the same time as the destination asks again; what hung may come in between.
            wanted = {"host-a": (other, others), "host-b": (SharedDirs([server.mounted]), directory)}
            standing = await both_ask(wanted, 2)
            assert mistakes(believed, failures, standing, server.backing) == [], at
            counts[outcome_of(believed, failures)] += 1
            latest = [await its.latest(at, GUEST) for its, at in wanted.values()]
            assert latest[0] == latest[1]
        assert counts["not begun"] > 0
        assert counts["unknown"] > 0
        assert counts["claimed"] > 0


def is_settled(fleet: Fleet, guest_id: str) -> bool:
    """One host has a machine of the guest, and it runs."""
    homes = [host for host in HOSTS if any(guest_id in name for name in fleet.machines(host))]
    return len(homes) == 1 and is_running(fleet, homes[0], guest_id)


@pytest.mark.parametrize("fault", [Fault.KILLED, Fault.FROZEN])
@pytest.mark.parametrize("is_after", [False, True])
async def test_a_move_whose_storage_server_fails_at_the_claim_leaves_exactly_one_guest(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, is_after: bool
) -> None:
    with scratch_folder() as folder:
        fleet = Fleet(folder)
        original = FileRecords.claim
        failed, healed = anyio.Event(), anyio.Event()
        with serving(folder / "backing", fleet.shared) as server:

            async def claim(self: FileRecords, directory: str, wanted: Ownership) -> Ownership:
                is_it = wanted.generation == 2 and not failed.is_set()
                standing = await original(self, directory, wanted) if is_it and is_after else None
                if is_it:
                    failed.set()
                    await run_sync(server.kill if fault is Fault.KILLED else server.freeze)
                return standing or await original(self, directory, wanted)

            monkeypatch.setattr(FileRecords, "claim", claim)
            async with running_fleet(folder) as fleet, anyio.create_task_group() as tasks:
                guest = fleet.start_guest("host-a", disk_path=None).guest_id
                most = 0

                async def heal() -> None:
                    await failed.wait()
                    await delay(DOWN_S)
                    await run_sync(server.heal)
                    healed.set()

                async def look() -> None:
                    nonlocal most
                    async for _ in looks(LOOK_EVERY_S):
                        most = max(most, sum(is_running(fleet, host, guest) for host in HOSTS))

                tasks.start_soon(heal)
                tasks.start_soon(look)
                job = await fleet.start("worker", "host-a", "host-b")
                report = report_of(await fleet.follow("host-a", job))
                # Whoever is in doubt asks again every 5 s.
                await healed.wait()
                await until(lambda: is_settled(fleet, guest), "one copy that runs", within_s=30)
                home = next(host for host in HOSTS if is_running(fleet, host, guest))
                await fleet.check_runs_only_at(home, guest)
                assert most == 1
                assert report.phase in (Phase.COMPLETE, Phase.ROLLED_BACK, Phase.IN_DOUBT)
                tasks.cancel_scope.cancel()
