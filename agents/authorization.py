"""Who may do what on this host: the rules of [[allow]], and the decision about one request.

Law: pure. Frozen rules and one function over them; nothing in here knows a socket, a clock, or how a request is
obeyed. What no rule allows is denied. Rules only allow: their order does not matter, and none takes away what another
gives. A refusal is made of what the peer has said itself and of this host's name: it is the same whether the guest
or job exists or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final

from transport.identity import Identity, Role

__all__ = [
    "RIGHTS_OF_ROLE",
    "RIGHT_FOR",
    "AccessPolicy",
    "AccessRule",
    "Action",
    "GuestNames",
    "Right",
    "Verdict",
    "is_identity",
]

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


class Right(StrEnum):
    """What a rule may give; the words of `may` in the configuration."""

    VIEW = "view"
    MOVE = "move"
    RESOLVE = "resolve"
    SEND_GUESTS = "send-guests"


class Action(StrEnum):
    """What a peer asks for; the commands' own words, also in the audit log."""

    HOSTS = "hosts"
    CPU = "cpu"
    GUESTS = "guests"
    JOBS = "jobs"
    WATCH = "watch"
    CHECK = "check"
    PREDICTIONS = "predictions"
    MOVE = "move"
    SET = "set"
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    RESOLVE = "resolve"
    SEND_GUESTS = "send-guests"


RIGHT_FOR: Final[Mapping[Action, Right]] = MappingProxyType(
    {
        Action.HOSTS: Right.VIEW,
        Action.CPU: Right.VIEW,
        Action.GUESTS: Right.VIEW,
        Action.JOBS: Right.VIEW,
        Action.WATCH: Right.VIEW,
        Action.CHECK: Right.VIEW,
        Action.PREDICTIONS: Right.VIEW,
        Action.MOVE: Right.MOVE,
        Action.SET: Right.MOVE,
        Action.PAUSE: Right.MOVE,
        Action.RESUME: Right.MOVE,
        Action.CANCEL: Right.MOVE,
        Action.RESOLVE: Right.RESOLVE,
        Action.SEND_GUESTS: Right.SEND_GUESTS,
    }
)

RIGHTS_OF_ROLE: Final[Mapping[Role, frozenset[Right]]] = MappingProxyType(
    {
        Role.OPERATOR: frozenset({Right.VIEW, Right.MOVE, Right.RESOLVE}),
        Role.AGENT: frozenset({Right.SEND_GUESTS}),
    }
)

# What a refusal calls an action, where its own word makes no sentence.
_VERBS: Final[Mapping[Action, str]] = MappingProxyType(
    {
        Action.HOSTS: "see this host",
        Action.CPU: "see the CPU models of this host",
        Action.GUESTS: "list guests",
        Action.JOBS: "list jobs",
        Action.PREDICTIONS: "list predictions",
        Action.SET: "set limits of",
        Action.SEND_GUESTS: "send",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestNames:
    """What a guest is called. Both are empty for one that nobody knows: only `*` covers that."""

    name: str
    guest_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRule:
    """One [[allow]]: peers of one role, what they may, and for which guests, sources and destinations.

    `names`, `guests`, `sources` and `destinations` are patterns with `*` and `?`. One of `guests` that is a whole
    identity (a UUID) covers the guest of that identity, every other one covers guests by their names: a guest that is
    named like another one's identity is not taken for it.
    """

    key: str
    role: Role
    names: tuple[str, ...]
    may: frozenset[Right]
    guests: tuple[str, ...] = ("*",)
    sources: tuple[str, ...] = ("*",)
    destinations: tuple[str, ...] = ("*",)

    def gives(self, identity: Identity, right: Right) -> bool:
        """Tell whether the peer has the right by this rule. Who may move or resolve may also see what."""
        if identity.role is not self.role or not _matches(self.names, identity.name):
            return False
        return right in self.may or (right is Right.VIEW and self.role is Role.OPERATOR)

    def covers(self, guest: GuestNames | None, source: str | None, to: str | None) -> bool:
        """Tell whether the rule is about these; None is what the request has nothing to do with."""
        return (
            (guest is None or any(_is_of(pattern, guest) for pattern in self.guests))
            and (source is None or _matches(self.sources, source))
            and (to is None or _matches(self.destinations, to))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The decision: `rule` is the key of the rule that allowed it, `reason` the sentence for who is denied."""

    is_allowed: bool
    rule: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPolicy:
    """All rules of one host."""

    host: str
    rules: tuple[AccessRule, ...] = ()

    def decide(
        self,
        identity: Identity,
        action: Action,
        *,
        what: str = "",
        guest: GuestNames | None = None,
        source: str | None = None,
        to: str | None = None,
    ) -> Verdict:
        """Decide about one request.

        Args:
            what: the guest or job in the peer's own words; it stands in the sentence for who is denied.
            guest, source, to: what it is about; None: it has nothing to do with one.
        """
        right = RIGHT_FOR[action]
        for rule in self.rules:
            if rule.gives(identity, right) and rule.covers(guest, source, to):
                return Verdict(is_allowed=True, rule=rule.key)
        wish = " ".join(word for word in (_VERBS.get(action, action), what, f"to {to}" if to else "") if word)
        return Verdict(
            is_allowed=False,
            reason=f"{identity} may not {wish}: no [[allow]] in the configuration of {self.host} allows it; "
            f'one with {identity.role}s = ["{identity.name}"] and may = ["{right}"] would',
        )


def is_identity(pattern: str) -> bool:
    """Tell whether a pattern for guests is one guest's identity."""
    return _UUID.fullmatch(pattern) is not None


def _is_of(pattern: str, guest: GuestNames) -> bool:
    return pattern == guest.guest_id if is_identity(pattern) else fnmatchcase(guest.name, pattern)


def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
