"""What can go wrong with an embedded guest.

EmbeddedError
├── SpecInvalid          theirs: a description of a machine that cannot be
├── StateInvalid         theirs: device state that is not of this machine
├── MessageInvalid       theirs: bytes on the control socket that are not a message; the connection is dead
├── RequestRefused       theirs: a request that the guest's process refuses in its present state
├── MachineFault         the guest's: its CPU met something it cannot execute
└── GuestGone            the world's: the guest's process ended, does not answer or could not be started
"""

from __future__ import annotations

from agents.errors import AgentError

__all__ = [
    "EmbeddedError",
    "GuestGone",
    "MachineFault",
    "MessageInvalid",
    "RequestRefused",
    "SpecInvalid",
    "StateInvalid",
]


class EmbeddedError(AgentError):
    """Base of this package's errors."""


class SpecInvalid(EmbeddedError):
    """A spec with mistakes. `problems` has one sentence for each, all of them, named by key."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "the guest's spec cannot be used: " + "; ".join(self.problems)


class StateInvalid(EmbeddedError):
    """Device state that does not fit: nothing of the machine was changed, or it must not run."""


class MessageInvalid(EmbeddedError):
    """What came on a control socket is no message of the protocol."""


class RequestRefused(EmbeddedError):
    """The guest's process understood a request and refuses it; the sentence says why."""


class MachineFault(EmbeddedError):
    """The guest's CPU stopped at an instruction that it cannot execute."""

    def __init__(self, rip: int, cause: str) -> None:
        super().__init__(rip, cause)
        self.rip = rip
        self.cause = cause

    def __str__(self) -> str:
        return f"the guest's CPU stopped at {self.rip:#x}: {self.cause}"


class GuestGone(EmbeddedError):
    """The guest's process ended, does not answer in time, or did not start."""
