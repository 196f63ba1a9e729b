"""Links that fail at every piece of a move: at the N-th piece of what passes, for all N, cut or swallowed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from tests.agents.host.network import Network
from tests.reliability.stage import Kind, Stage, Tally, stage
from tests.waiting import delay, looks

__all__ = ["LAST_PIECES", "try_black_holes", "try_cuts"]

# The last pieces of a move are the switchover, no two of them alike: they are all tried, whatever is skipped before.
LAST_PIECES: Final = 64
# More than the bound for dead peers, less than the outage that is borne (`tests.reliability.stage`).
SWALLOWED_S: Final = 2.5

_Move = Callable[[Stage, Network, int], Awaitable[None]]


async def try_cuts(kind: Kind, event_loop: str, *, every: int = 1, last: int = LAST_PIECES) -> Tally:
    """Move a guest to and fro, with one cut in each move; those of the pre-copy are `every` pieces apart."""

    async def move(place: Stage, network: Network, number: int) -> None:
        network.cut_at = number
        async with place.trial():
            pass
        network.cut_at = None

    return await _at_each_piece(kind, event_loop, every, last, move)


async def try_black_holes(kind: Kind, event_loop: str, *, every: int = 1, last: int = LAST_PIECES) -> Tally:
    """Move a guest to and fro, while a network swallows everything for a time, from one piece on in each move."""

    async def move(place: Stage, network: Network, number: int) -> None:
        network.stall_at = number
        async with place.trial():
            await _swallow(place)
        network.stall_at = None

    return await _at_each_piece(kind, event_loop, every, last, move)


async def _at_each_piece(kind: Kind, event_loop: str, every: int, last: int, move: _Move) -> Tally:
    async with stage(kind, event_loop, has_networks=True) as place:
        for number in _numbers(await _pieces_of_a_move(place), every, last):
            network = place.networks[place.away]
            network.pieces = 0
            await move(place, network, number)
        return place.tally


async def _swallow(place: Stage) -> None:
    network, source = place.networks[place.away], place.home
    async for _ in looks(0.01):
        if network.is_stalled or await place.rests(source):
            break
    if network.is_stalled:
        await delay(SWALLOWED_S)
        network.mend()


async def _pieces_of_a_move(place: Stage) -> int:
    """Move it once without any fault, and count what passes; that trial is not tallied."""
    network = place.networks[place.away]
    network.pieces = 0
    async with place.trial():
        pass
    place.tally = Tally()
    return network.pieces


def _numbers(pieces: int, every: int, last: int) -> Iterator[int]:
    switchover = max(pieces - last, 0)
    yield from range(0, switchover, every)
    yield from range(switchover, pieces)
