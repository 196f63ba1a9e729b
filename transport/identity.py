"""Who a peer is: a role and a name, written as one URI.

Law: pure; no socket, no certificate. `transport.tls` finds identities in certificates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from transport.errors import UntrustedPeer

__all__ = ["SCHEME", "Identity", "Role", "parse_identity"]

SCHEME: Final = "vmferry://"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}", re.ASCII)


class Role(StrEnum):
    """What a peer may do."""

    AGENT = "agent"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A peer as its certificate names it; `str()` is `agent/host-a`."""

    role: Role
    name: str

    def __str__(self) -> str:
        return f"{self.role.value}/{self.name}"

    @property
    def uri(self) -> str:
        """How the identity stands in a certificate."""
        return f"{SCHEME}{self}"


def parse_identity(uri: str) -> Identity:
    """Read an identity's URI.

    Raises:
        UntrustedPeer: it is none of ours, in plain words.
    """
    role_word, slash, name = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or not slash or _NAME.fullmatch(name) is None:
        raise UntrustedPeer(f"the certificate's URI {uri[:200]!r} names no identity (vmferry://ROLE/NAME)")
    try:
        return Identity(role=Role(role_word), name=name)
    except ValueError as exc:
        roles = " and ".join(each.value for each in Role)
        raise UntrustedPeer(
            f"the certificate has the unknown role {role_word[:64]!r}; there are {roles}"
        ) from exc
