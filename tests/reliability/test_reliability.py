"""A sample of what `python -m bench faults` tries in full."""

from __future__ import annotations

import anyio
import pytest

from tests.agents.hypervisors.qemu.conftest import needs_qemu
from tests.reliability.kills import Role, try_kills
from tests.reliability.links import try_black_holes, try_cuts
from tests.reliability.stage import Kind, Tally

pytestmark = pytest.mark.slow

# The window that the stage gives each move, what its two connections may have under way beyond it, and the heads and
# tags of all that.
MOST_RESENT_BYTES = (4 << 20) + 2 * (2 << 20) + (64 << 10)
# Without these the series has not tried what it is for.
KILLED_AT = {
    Role.SOURCE: {"after journal commit-may-leave", "before Commit", "after Commit", "before destroy"},
    Role.DESTINATION: {"after journal may-claim", "before claim", "after claim", "after resume"},
}


def check(tally: Tally, *, at_least: int) -> None:
    assert (tally.lost, tally.doubled, tally.wrong) == (0, 0, 0), tally
    assert tally.tried >= at_least
    assert tally.moved > 0
    assert tally.most_resent_bytes <= MOST_RESENT_BYTES


@pytest.mark.parametrize("event_loop", ["asyncio", "trio"])
def test_cuts_all_the_way_through_lose_nothing(event_loop: str) -> None:
    check(anyio.run(lambda: try_cuts(Kind.EMBEDDED, event_loop, every=32, last=20)), at_least=20)


@pytest.mark.parametrize("event_loop", ["asyncio", "trio"])
def test_networks_that_swallow_everything_lose_nothing(event_loop: str) -> None:
    check(anyio.run(lambda: try_black_holes(Kind.EMBEDDED, event_loop, every=96, last=5)), at_least=6)


@pytest.mark.parametrize(
    ("event_loop", "role"), [("asyncio", Role.SOURCE), ("trio", Role.DESTINATION)], ids=str
)
def test_kills_at_every_instant_lose_nothing(event_loop: str, role: Role) -> None:
    tally, died_at = anyio.run(lambda: try_kills(Kind.EMBEDDED, event_loop, role))
    check(tally, at_least=len(died_at))
    assert set(died_at) >= KILLED_AT[role]


@needs_qemu()
@pytest.mark.parametrize(
    ("event_loop", "role"), [("trio", Role.SOURCE), ("asyncio", Role.DESTINATION)], ids=str
)
def test_kills_of_agents_lose_no_qemu_guest(event_loop: str, role: Role) -> None:
    tally, died_at = anyio.run(lambda: try_kills(Kind.QEMU, event_loop, role, every=8))
    check(tally, at_least=len(died_at))
