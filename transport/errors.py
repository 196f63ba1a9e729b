"""What can go wrong between two hosts, and whose fault it is.

TransportError
├── LocalMisuse          ours: a bug in the code that called
├── PeerMisbehaved       theirs: hostile or broken peer; the stream that it came on is dead
│   ├── FrameTooLarge      ... it announced more than a limit allows
│   ├── BadSeal            ... a record that its key did not seal, or that was changed on the way
│   ├── BadMessage         ... a control message that is not of the schema
│   └── ReplayedRecord     ... an acknowledgement that came before
├── PeerGone             the world's: broken or silent link
│   └── SessionForgotten   ... the peer is there and was restarted: it knows nothing of this session
├── PeerRefused          the peer understood and said no, in its own words
├── VersionMismatch      both are well, but of releases that do not talk to each other
└── UntrustedPeer        a certificate is missing, wrong, expired, or of somebody else

`str()` of each is one sentence; what a program needs is in attributes.
"""

from __future__ import annotations

__all__ = [
    "BadMessage",
    "BadSeal",
    "FrameTooLarge",
    "LocalMisuse",
    "PeerGone",
    "PeerMisbehaved",
    "PeerRefused",
    "ReplayedRecord",
    "SessionForgotten",
    "TransportError",
    "UntrustedPeer",
    "VersionMismatch",
]


class TransportError(Exception):
    """Base of this package's errors."""


class LocalMisuse(TransportError):
    """The caller broke the contract of what it called: a bug on this side."""


class PeerMisbehaved(TransportError):
    """The peer sent what no correct peer sends. Whatever it came on must not be read any further."""


class FrameTooLarge(PeerMisbehaved):
    """The peer announced `got_bytes` where at most `limit_bytes` are allowed."""

    def __init__(self, got_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"the peer announced {got_bytes} bytes where at most {limit_bytes} are allowed")
        self.got_bytes = got_bytes
        self.limit_bytes = limit_bytes


class BadSeal(PeerMisbehaved):
    """Record `seq` was not sealed with this migration's key, or was changed on the way."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"record {seq} does not open: it was changed on the way or sealed with another key")
        self.seq = seq


class BadMessage(PeerMisbehaved):
    """A control message that is not of the schema; the sentence says which part."""


class ReplayedRecord(PeerMisbehaved):
    """Acknowledgement record `seq` came on a connection that had already carried a later one."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"acknowledgement record {seq} was repeated or came out of order")
        self.seq = seq


class PeerGone(TransportError):
    """The link broke, or nothing came over it for too long.

    `may_have_reached_peer` is False only when not one byte of the request in question was ever given to a
    stream: then the peer certainly never saw it. In every other case the peer may have acted on it.
    """

    def __init__(self, cause: str, *, may_have_reached_peer: bool = True) -> None:
        super().__init__(cause)
        self.may_have_reached_peer = may_have_reached_peer


class SessionForgotten(PeerGone):
    """The peer is there, and does not know the session: it was restarted since it began, or has ended it."""


class PeerRefused(TransportError):
    """The peer understood and refused. `text` is its own sentence, `code` is for programs."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"the peer refused: {self.text}"


class VersionMismatch(TransportError):
    """No protocol version is spoken by both sides."""

    def __init__(self, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
        super().__init__(
            f"no common protocol version: this side speaks {ours[0]} to {ours[1]}, the peer {theirs[0]} to "
            f"{theirs[1]}; upgrade the older side, one release at a time"
        )
        self.ours = ours
        self.theirs = theirs


class UntrustedPeer(TransportError):
    """One side does not trust the other's certificate; the sentence says which and why."""
