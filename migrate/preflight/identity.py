"""Who is who: names that tell two hosts apart, and a guest that is not there already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.preflight.evidence import Inspection
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "IDENTITY", "NAME", "NAMES", "judge"]

NAMES: Final = Check(
    check_id="names",
    asked="Do the two hosts have different names?",
    why="An ownership record tells hosts apart by their names",
    remedy="Give each host a name of its own ([agent] name) and a certificate for it",
)
IDENTITY: Final = Check(
    check_id="identity",
    asked="Is the guest's identity free at the destination?",
    why="Two machines of one identity would be two copies of one guest",
    remedy="End that guest there, or find out why there are two",
)
NAME: Final = Check(
    check_id="name",
    asked="Is the guest's name free at the destination?",
    why="Names are for people: a command that gives the name of two guests is answered with a question",
    remedy="Rename one of them when it can be shut down, and give identities in commands until then",
)
CHECKS: Final = (NAMES, IDENTITY, NAME)


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge names and identities."""
    guest, host, source = inspection.guest, inspection.host, inspection.source_host
    if source != host.name:
        yield NAMES.ok(f"{source} and {host.name} have different names")
    else:
        yield NAMES.refused(
            f"both hosts are named {source}: neither could tell its own ownership record from the other's"
        )
    if guest.guest_id in host.guest_ids:
        yield IDENTITY.refused(f"{host.name} already has a guest with the identity {guest.guest_id}")
    else:
        yield IDENTITY.ok(f"{host.name} has no guest of this identity")
    if guest.name in host.hardware.guest_names:
        yield NAME.warning(f"{host.name} has another guest that is named {guest.name}")
    else:
        yield NAME.ok(f"{host.name} has no other guest named {guest.name}")
