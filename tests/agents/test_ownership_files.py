from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from agents.ownership.files import OWNERSHIP_DIR
from agents.storage import SharedDirs
from migrate.errors import NotRecorded, StorageFailed
from migrate.ownership import Ownership
from tests.reliability.storage import Fault, FaultyOs

pytestmark = pytest.mark.anyio

GUEST_ID = "11111111-2222-3333-4444-555555555555"
# What a server says that looked at the link and made none.
REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)
# What is said when no answer came, or one that says nothing of what was done.
SILENCE = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EINTR)


def record(generation: int, owner: str) -> Ownership:
    return Ownership(guest_id=GUEST_ID, generation=generation, owner=owner, migration_id="m-1")


class FailingLinks(FaultyOs):
    """Every link fails."""

    def __getattr__(self, name: str) -> object:
        if name != "link":
            return getattr(os, name)
        return lambda *arguments: self._link(*arguments)

    def _link(self, existing: Path, name: Path) -> None:
        self.calls.append("link")
        if self.fault is Fault.DONE_BUT_FAILS:
            os.link(existing, name)
        raise OSError(self.errno, os.strerror(self.errno))


async def claim_with(shared: Path, faulty: FaultyOs) -> Ownership:
    storage, directory = SharedDirs([shared]), str(shared / OWNERSHIP_DIR)
    await storage.claim(directory, record(1, "host-a"))
    with faulty.in_place():
        return await storage.claim(directory, record(2, "host-b"))


@pytest.mark.parametrize("code", REFUSALS)
async def test_a_link_that_a_server_refused_is_known_not_to_be_made(tmp_path: Path, code: int) -> None:
    with pytest.raises(NotRecorded):
        await claim_with(tmp_path, FailingLinks(0, code))
    assert [path.name for path in (tmp_path / OWNERSHIP_DIR).iterdir()] == [f"{GUEST_ID}.000000000001"]


@pytest.mark.parametrize("code", SILENCE)
async def test_a_link_without_an_answer_is_not_known_to_be_made_or_not(tmp_path: Path, code: int) -> None:
    with pytest.raises(StorageFailed) as failed:
        await claim_with(tmp_path, FailingLinks(0, code))
    assert not isinstance(failed.value, NotRecorded)


@pytest.mark.parametrize("code", [*REFUSALS, *SILENCE])
async def test_a_link_that_was_made_and_reported_as_failed_is_found(tmp_path: Path, code: int) -> None:
    faulty = FailingLinks(0, code, Fault.DONE_BUT_FAILS)
    assert await claim_with(tmp_path, faulty) == record(2, "host-b")


async def test_a_stale_handle_is_asked_again_and_no_more_often_than_helps(tmp_path: Path) -> None:
    faulty = FailingLinks(0, errno.ESTALE)
    with pytest.raises(StorageFailed, match="Stale"):
        await claim_with(tmp_path, faulty)
    assert len(faulty.calls) == 3


async def test_an_unsure_first_try_makes_a_later_refusal_unsure_too(tmp_path: Path) -> None:
    class Interrupted(FailingLinks):
        def _link(self, existing: Path, name: Path) -> None:
            self.errno = errno.ENOSPC if self.calls else errno.EINTR
            super()._link(existing, name)

    with pytest.raises(StorageFailed) as failed:
        await claim_with(tmp_path, Interrupted(0))
    assert not isinstance(failed.value, NotRecorded)


async def test_what_failing_storage_left_is_cleared_away_after_the_next_move(tmp_path: Path) -> None:
    storage, folder = SharedDirs([tmp_path]), tmp_path / OWNERSHIP_DIR
    await storage.claim(str(folder), record(1, "host-a"))
    for name in (f".claim-{GUEST_ID}.000000000002-00", f".trial-{GUEST_ID}-00", ".trial-another-00"):
        (folder / name).write_bytes(b"")
    await storage.tidy(str(folder), GUEST_ID)
    assert not (folder / f".trial-{GUEST_ID}-00").exists()
    assert (folder / ".trial-another-00").exists()
    # A claim of the next generation may be one that is about to be made.
    assert (folder / f".claim-{GUEST_ID}.000000000002-00").exists()
    await storage.claim(str(folder), record(2, "host-b"))
    await storage.tidy(str(folder), GUEST_ID)
    assert not (folder / f".claim-{GUEST_ID}.000000000002-00").exists()
