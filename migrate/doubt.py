"""The way out of IN_DOUBT: ownership decides, by whoever creates the next record first.

Law: nothing here lets a guest run. It says who owns it; the caller acts on that and on nothing else.
"""

from __future__ import annotations

import contextlib
from typing import Final

import anyio

from migrate.errors import InDoubt, StorageFailed
from migrate.ownership import Ownership, RecordInvalid, Verdict, next_generation, verdict_for_source
from migrate.ports import SharedStorage

__all__ = ["CLAIM_ATTEMPTS", "CLAIM_PAUSE_S", "record_that_it_runs", "settle"]

# A storage server that fails over takes some seconds; longer outages are for `vmferry resolve`.
CLAIM_ATTEMPTS: Final = 5
CLAIM_PAUSE_S: Final = 1.0


async def settle(storage: SharedStorage, directory: str, claim: Ownership) -> Verdict:
    """Find out who owns the guest, by taking it for the source unless the destination has.

    Args:
        storage: where the records live.
        directory: the guest's ownership directory.
        claim: generation N+1 for the source, of the migration in doubt.

    Returns:
        SOURCE: the source owns it and may run it. DESTINATION: it runs there, or has; this copy must never run again.

    Raises:
        InDoubt: the storage gave no answer that can be relied on, or the destination has taken the guest and has not
            said that it runs: the guest stays stopped, and its copy here stays.
    """
    failure: Exception | None = None
    for attempt in range(CLAIM_ATTEMPTS):
        if attempt:
            await anyio.sleep(CLAIM_PAUSE_S)
        try:
            standing = await storage.claim(directory, claim)
        except (StorageFailed, RecordInvalid) as exc:
            failure = exc
            continue
        match verdict_for_source(standing, claim):
            case Verdict.SOURCE | Verdict.DESTINATION as verdict:
                return verdict
            case Verdict.TAKEN:
                failure = InDoubt(
                    f"{standing.owner} has taken the guest, and has not said that it runs there. The stopped copy here "
                    "stays: it may be the last one. It is settled as soon as the agent of that host is back; "
                    "`vmferry resolve` tells more"
                )
            case Verdict.UNDECIDED:
                failure = StorageFailed(
                    f"{directory} shows generation {standing.generation} after {claim.generation} was made"
                )
    if isinstance(failure, InDoubt):
        raise failure
    raise InDoubt(
        f"the ownership record in {directory} could not be read or made: {failure}. The guest stays stopped here; "
        "when the storage answers again, run `vmferry resolve`"
    ) from failure


async def record_that_it_runs(storage: SharedStorage, directory: str, claim: Ownership) -> None:
    """Say, after the claim, that the guest runs here: from then on a source in doubt may end its stopped copy.

    Nothing is lost where the storage does not take it: the source's copy stays until somebody resolves.
    """
    word = next_generation(claim, claim.owner, claim.migration_id)
    for attempt in range(CLAIM_ATTEMPTS):
        if attempt:
            await anyio.sleep(CLAIM_PAUSE_S)
        with contextlib.suppress(StorageFailed, RecordInvalid):
            await storage.claim(directory, word)
            return
