"""Do moves end within the intervals that were predicted of them?

Two agent processes on this machine; embedded guests and, where there is one, stock QEMU; links of 100 Mbit/s and
1 Gbit/s by the bandwidth cap, and loopback. Each move is predicted by a check just before it; the agents learn as they
go, from nothing. A coverage of 1 is no better than one of 0.8: it comes with intervals that are wider than they need
to be.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.to_thread

from agents.client import Fleet
from agents.config import EventLoop
from agents.demo.embedded import end_embedded_guests
from agents.demo.errors import NoQemu
from agents.demo.qemu import QemuDemoGuest, best_accel, find_qemu
from agents.demo.scratch import HOSTS, Scratch, open_scratch, running_agents
from agents.errors import AgentError
from agents.hypervisors.embedded.client import start_guest
from agents.hypervisors.embedded.spec import Content, EmbeddedSpec, Pattern
from agents.testguest.image import KernelMissing, find_kernel
from migrate.errors import MigrationError
from migrate.forecast import PROBE_S, PastMove
from migrate.lessons import Score, scores

QUESTION: Final = "Do moves end within the intervals that were predicted of them?"

MIB: Final = 1 << 20
EMBEDDED_MOVES: Final = 28
# Each goes back and forth, so that each agent sees half of its moves.
QEMU_RATES: Final = (10, 100)
QEMU_MOVES: Final = 4
RATES_MIB: Final = (0, 5, 20, 50, 100, 200)
CAPS: Final = (12_500_000, 125_000_000, 0)
TIMEOUT_S: Final = 30.0
SEED: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """One move: of a new embedded guest on the first host, or of a QEMU guest from where it is."""

    spec: EmbeddedSpec | None
    guest_id: str
    name: str
    cap_bytes_per_s: int


def run(smoke: bool) -> dict[str, object]:
    """Give coverage, width and bias for each quantity, of all moves and of the second half of them."""
    moves, checks_s = anyio.run(_run, smoke)
    return {"check_with_prediction_s": statistics.median(checks_s), **dict(_figures(moves))}


async def _run(smoke: bool) -> tuple[list[PastMove], list[float]]:
    """Give all moves that were predicted, and how long each check took."""
    with open_scratch(keep=False) as scratch:
        scratch.has_qemu = not smoke
        try:
            async with running_agents(scratch, event_loop=EventLoop.ASYNCIO, with_cutter=False) as agents:
                fleet = Fleet(agents.settings)
                async with _qemu_guests(scratch, is_wanted=not smoke) as qemus:
                    orders = list(_orders(2 if smoke else EMBEDDED_MOVES, qemus))
                    checks_s = [await _move(scratch, fleet, order) for order in orders]
                lists = (await fleet.predictions()).answers
                moves = [one for each in lists.values() for one in each.moves]
                return sorted(moves, key=lambda one: one.prediction.made_at_s), checks_s
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(end_embedded_guests, scratch)


@contextlib.asynccontextmanager
async def _qemu_guests(scratch: Scratch, *, is_wanted: bool) -> AsyncIterator[list[QemuDemoGuest]]:
    """Boot the QEMU guests; none where there is no QEMU."""
    guests: list[QemuDemoGuest] = []
    try:
        if is_wanted:
            try:
                binary = find_qemu()
                find_kernel()
                for rate in QEMU_RATES:
                    guest = QemuDemoGuest(
                        scratch,
                        ram_bytes=256 * MIB,
                        dirty_bytes_per_s=rate * MIB,
                        binary=binary,
                        accel=best_accel(),
                    )
                    guests.append(guest)
                    await guest.start(HOSTS[0])
            except (NoQemu, KernelMissing) as exc:
                print(f"without QEMU guests: {exc}", file=sys.stderr, flush=True)
        yield guests
    finally:
        for guest in guests:
            await guest.end()


def _orders(embedded: int, qemus: Sequence[QemuDemoGuest]) -> Iterator[_Order]:
    """Mix the moves of both kinds, the same in each run."""
    random_ = random.Random(SEED)
    shuffled = [index for index in range(len(qemus)) for _ in range(QEMU_MOVES)] + [-1] * embedded
    random_.shuffle(shuffled)
    for number, index in enumerate(shuffled):
        # Idle and busy guests over every link, and not the same ones in both halves.
        cap = CAPS[random_.randrange(len(CAPS))]
        if index >= 0:
            guest = qemus[index]
            yield _Order(
                spec=None,
                guest_id=guest.guest_id,
                name=f"qemu-{index}",
                cap_bytes_per_s=max(cap, CAPS[1]) if cap else 0,
            )
            continue
        rate = RATES_MIB[random_.randrange(len(RATES_MIB))]
        # Over a slow link a large working set that is written fast does not converge: one in eight does not.
        large = random_.random() < 0.125 or cap != CAPS[0]
        spec = EmbeddedSpec(
            guest_id=str(uuid.UUID(int=random_.getrandbits(128), version=4)),
            name=f"move-{number}",
            ram_bytes=random_.choice((96, 128, 256)) * MIB,
            pattern=Pattern.IDLE
            if rate == 0
            else random_.choice((Pattern.HOT, Pattern.RANDOM, Pattern.SEQUENTIAL)),
            dirty_bytes_per_s=rate * MIB,
            working_set_bytes=(random_.choice((8, 16, 32)) if large else 1) * MIB,
            content=random_.choice((Content.COMPRESSIBLE, Content.INCOMPRESSIBLE)),
            fill_bytes=random_.choice((16, 48, 80)) * MIB,
            seed=number + 1,
        )
        yield _Order(spec=spec, guest_id=spec.guest_id, name=spec.name, cap_bytes_per_s=cap)


async def _move(scratch: Scratch, fleet: Fleet, order: _Order) -> float:
    """Predict a move and make it, and tell both on stderr; give the seconds of the check."""
    if order.spec is not None:
        await anyio.to_thread.run_sync(start_guest, order.spec, scratch.guests_dir(HOSTS[0]))
        # It fills its RAM first, and begins to write then.
        await anyio.sleep(1.0)
    # One that did not converge is still where it was.
    source = await fleet.find_guest(order.guest_id)
    to = HOSTS[1 - HOSTS.index(source)]
    began_s = anyio.current_time()
    async with fleet.connect(source) as agent:
        report = await agent.check(
            order.guest_id, to, predict_s=PROBE_S, bandwidth_bytes_per_s=order.cap_bytes_per_s
        )
    check_s = anyio.current_time() - began_s
    ended = "complete"
    try:
        await fleet.move(
            order.guest_id,
            to,
            bandwidth_bytes_per_s=order.cap_bytes_per_s,
            timeout_s=TIMEOUT_S,
        )
    except (MigrationError, AgentError) as exc:
        ended = f"rolled back: {exc}"
    with contextlib.suppress(AgentError):
        async with fleet.connect(source) as agent:
            moves = (await agent.predictions(order.guest_id)).moves
            print(
                f"{order.name} {source} cap={order.cap_bytes_per_s / 1e6:g} MB/s {report.unpredicted}"
                f" {_in_words(moves[-1]) if moves else ''} {ended:.60}",
                file=sys.stderr,
                flush=True,
            )
    if order.spec is not None:
        await anyio.to_thread.run_sync(end_embedded_guests, scratch)
    return check_s


def _in_words(one: PastMove) -> str:
    parts = []
    for quantity in ("total_s", "downtime_s", "wire_bytes", "cpu_s"):
        interval = one.prediction.figures.of(quantity)
        value = one.outcome.value(quantity) if one.outcome else None
        took = "-" if value is None else f"{value:.4g}{'' if interval.holds(value) else '!'}"
        parts.append(f"{quantity}={took} of {interval.low:.4g}..{interval.high:.4g}")
    return f"{', '.join(parts)} converging={one.prediction.converging_share:.2f}"


def _figures(moves: Sequence[PastMove]) -> Iterator[tuple[str, object]]:
    ended = [one for one in moves if one.outcome is not None]
    half = ended[len(ended) // 2 :]
    yield "moves", len(ended)
    yield "rolled_back", sum(not one.outcome.is_complete for one in ended if one.outcome)
    right = [one.prediction.converges == one.outcome.is_complete for one in ended if one.outcome]
    yield "convergence_foretold_ratio", statistics.fmean(right) if right else 0.0
    yield from _scored("", scores(ended))
    yield from _scored("second_half_", scores(half))
    # What the model says before the lessons: what learning is worth.
    yield from _scored("uncorrected_second_half_", scores(half, lambda one: one.prediction.modelled))


def _scored(prefix: str, scored: Sequence[Score]) -> Iterator[tuple[str, object]]:
    for one in scored:
        name = f"{prefix}{one.quantity.rpartition('_')[0]}"
        for figure, value in (("coverage", one.coverage), ("width", one.width), ("bias", one.bias)):
            if value is not None:
                yield f"{name}_{figure}_ratio", value
