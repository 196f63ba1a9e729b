"""What can go wrong with a migration, and who runs the guest afterwards.

MigrationError
├── SetupRefused         before the first page: nothing was changed anywhere
│   ├── PreflightRefused   ... by the preflight report that it carries
│   ├── GuestUnknown       ... no such guest on this host
│   ├── GuestRefused       ... a driver cannot do this with this guest or this machine
│   └── GuestBusy          ... another migration holds this guest
├── MigrationFailed      rolled back: the guest runs at the source, nothing is left at the destination
│   ├── NotConverging      ... because the policy's limits cannot be met
│   └── MigrationCancelled ... because somebody asked for it
├── RollbackIncomplete   the guest runs at the source, but something was left behind: it says what
└── InDoubt              COMMIT may have left: ownership decides who runs the guest
"""

from __future__ import annotations

__all__ = [
    "GuestBusy",
    "GuestRefused",
    "GuestUnknown",
    "InDoubt",
    "JournalFailed",
    "MigrationCancelled",
    "MigrationError",
    "MigrationFailed",
    "NotConverging",
    "PreflightRefused",
    "RollbackIncomplete",
    "SetupRefused",
    "NotRecorded",
    "StorageFailed",
    "TooLate",
    "first_failure",
]


class MigrationError(Exception):
    """Base of this package's errors. `str()` is one sentence for the person who asked for the move."""


class SetupRefused(MigrationError):
    """Refused before anything was changed."""


class GuestUnknown(SetupRefused):
    """No guest of that identity or name on this host."""


class GuestRefused(SetupRefused):
    """A driver cannot do this: the sentence names the cause and the remedy."""


class GuestBusy(SetupRefused):
    """Another migration of this guest is under way."""


class TooLate(SetupRefused):
    """The migration has gone too far for this: COMMIT may have left, or the pre-copy is over."""


class PreflightRefused(SetupRefused):
    """The preflight found problems. `problems` has one sentence for each, all of them."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class MigrationFailed(MigrationError):
    """Rolled back: the guest runs at the source and nothing is left at the destination."""


class NotConverging(MigrationFailed):
    """The guest writes faster than the link can carry within the limits that were given."""


class MigrationCancelled(MigrationFailed):
    """Somebody asked for it."""


class RollbackIncomplete(MigrationError):
    """Rolled back, but with something left behind; `leftovers` names each thing."""

    def __init__(self, cause: str, leftovers: tuple[str, ...]) -> None:
        super().__init__(f"{cause}; left behind: {', '.join(leftovers)}")
        self.leftovers = leftovers


class InDoubt(MigrationError):
    """COMMIT may have left and nobody knows yet who owns the guest: until then it stays stopped here."""


class JournalFailed(MigrationError):
    """The journal cannot be written, so the step that it announces must not be made."""


class StorageFailed(MigrationError):
    """The shared storage did not do what was asked, or nobody knows whether it did."""


class NotRecorded(StorageFailed):
    """The shared storage is known not to have made a record, and nothing that was asked of it can still make it."""


def first_failure(error: BaseException) -> BaseException:
    """Give what a task group failed of; its other members failed by being cancelled."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
