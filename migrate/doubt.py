"""The way out of IN_DOUBT: ownership decides, by whoever creates the next record first.

Law: nothing here lets a guest run. It says who owns it; the caller acts on that and on nothing else.
"""

from __future__ import annotations

from typing import Final

import anyio

from migrate.errors import InDoubt, StorageFailed
from migrate.ownership import Ownership, RecordInvalid, Verdict, verdict_for_source
from migrate.ports import SharedStorage

__all__ = ["CLAIM_ATTEMPTS", "CLAIM_PAUSE_S", "settle"]

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
        SOURCE: the source owns it and may run it. DESTINATION: it must never run this copy again.

    Raises:
        InDoubt: the storage gave no answer that can be relied on; the guest stays stopped.
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
        verdict = verdict_for_source(standing, claim)
        if verdict is not Verdict.UNDECIDED:
            return verdict
        failure = StorageFailed(
            f"{directory} shows generation {standing.generation} after {claim.generation} was made"
        )
    raise InDoubt(
        f"the ownership record in {directory} could not be read or made: {failure}. The guest stays stopped here; "
        "when the storage answers again, run `vmferry resolve`"
    ) from failure
