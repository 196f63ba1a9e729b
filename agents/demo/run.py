"""The demo's story, from top to bottom: a guest moves from host-a to host-b while it runs, and that is proved.

Law: whoever calls decides what is shown and how it is ended: cancel `run_demo`, and it cleans up and is gone.

Tasks: one looks at the guest on host-a while it is moved, one lifts the bandwidth cap after the last cut of the
link; both end with the move. Those of the agents' processes are `scratch`'s.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import anyio

from agents.api import JobView
from agents.client import Fleet
from agents.config import EventLoop
from agents.demo.cutter import CutPlan, Cutter
from agents.demo.embedded import EmbeddedDemoGuest
from agents.demo.errors import DemoFailed
from agents.demo.guests import DemoGuest, Look
from agents.demo.proof import Evidence, Proof, Standstill, judge
from agents.demo.qemu import QemuDemoGuest, best_accel, find_qemu
from agents.demo.scratch import DESTINATION, SOURCE, Agents, Scratch, open_scratch, running_agents
from agents.errors import AgentError, RequestRefused
from agents.units import approx_duration
from migrate.compression import Compression
from migrate.errors import MigrationError
from migrate.stats import Report
from transport.errors import TransportError

__all__ = ["MIN_RAM_BYTES", "Demo", "GuestKind", "Outcome", "Show", "least_ram_bytes", "run_demo"]

# Below this the content and the working set would be a handful of pages.
MIN_RAM_BYTES: Final = 4 << 20
# Linux and its initramfs, and something to move.
MIN_QEMU_RAM_BYTES: Final = 160 << 20
RUN_AFTER_S: Final = 0.5
# What a first pass takes for each part between two cuts; see MIN_CUT_GAP_S.
CUT_PART_S: Final = 0.5
# What its content becomes on the wire: 7 to 8 times smaller where it is compressed; `auto` begins without, as long as
# it does not know the link. With less than this the transfer would be over before the last cut.
COMPRESSION_RATIOS: Final = MappingProxyType({Compression.OFF: 1, Compression.AUTO: 4, Compression.ZSTD: 8})
# Two batches of pages of its content: with less between two cuts nothing would ever arrive whole.
RAM_BYTES_PER_CUT: Final = 4 << 20
# Of less, all that is sent fits into the burst of the cap and the sockets' buffers, and is gone before it can be cut.
MIN_CUT_RAM_BYTES: Final = 64 << 20


class GuestKind(StrEnum):
    """What kind of guest is moved."""

    EMBEDDED = "embedded"
    QEMU = "qemu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What is asked for. `link_cuts` is how often the link is cut; None is no cap, and the agents' default."""

    ram_bytes: int
    dirty_bytes_per_s: int
    kind: GuestKind = GuestKind.EMBEDDED
    link_bytes_per_s: int | None = None
    is_offline: bool = False
    link_cuts: int = 0
    compression: Compression | None = None
    event_loop: EventLoop = EventLoop.ASYNCIO
    keep: bool = False


def least_ram_bytes(link_cuts: int, kind: GuestKind = GuestKind.EMBEDDED) -> int:
    """Give the RAM that a guest must have: to be one, and for its link to be cut so often while it is moved."""
    least_bytes = MIN_RAM_BYTES if kind is GuestKind.EMBEDDED else MIN_QEMU_RAM_BYTES
    if link_cuts:
        least_bytes = max(least_bytes, MIN_CUT_RAM_BYTES, RAM_BYTES_PER_CUT * (link_cuts + 1))
    return least_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it. `cuts` is how often the link was cut; `folder` is None when it was removed."""

    demo: Demo
    report: Report
    proof: Proof
    evidence: Evidence
    cuts: int
    folder: Path | None

    @property
    def were_cuts_made(self) -> bool:
        """Whether the link was cut as often as was asked for, and the agents noticed each time."""
        return self.cuts == self.demo.link_cuts and self.report.link_breaks >= self.cuts


class Show(Protocol):
    """Shows the story. Called on the event loop's thread."""

    def begins(self, sentence: str) -> None:
        """Something is under way; said again with other words, it replaces what was said."""
        ...

    def done(self, sentence: str) -> None:
        """What was under way is done."""
        ...

    def moving(self, view: JobView) -> None:
        """The move, as it is now."""
        ...


async def run_demo(demo: Demo, show: Show) -> Outcome:
    """Play the demo.

    Raises:
        DemoFailed: it ended early, for a cause that is known; everything was ended, the directory is kept.
    """
    scratch: Scratch | None = None
    try:
        with open_scratch(keep=demo.keep) as scratch:
            return await _play(demo, scratch, show)
    except Exception as exc:
        if scratch is None or (causes := _known_causes(exc)) is None:
            raise
        raise DemoFailed(causes, scratch.folder, scratch.logs) from exc


async def _play(demo: Demo, scratch: Scratch, show: Show) -> Outcome:
    guest = _guest(demo, scratch)
    show.begins("starting two agents")
    try:
        async with running_agents(
            scratch, event_loop=demo.event_loop, with_cutter=demo.link_cuts > 0
        ) as agents:
            show.done(f"two agents, {SOURCE} and {DESTINATION}, trust each other's certificates")
            show.begins(f"starting a guest on {SOURCE}: {guest.sentence}")
            await guest.start(SOURCE)
            show.done(f"a guest runs on {SOURCE}: {guest.sentence}")
            report, at_source, source_has_ended = await _move(demo, agents, guest, show)
            show.begins(f"watching it run on {DESTINATION}")
            arrived = await guest.look(DESTINATION)
            await anyio.sleep(RUN_AFTER_S)
            later = await guest.look(DESTINATION)
            show.done(f"it runs on at {DESTINATION}: {later.written} pages written, {later.errors} errors")
            moved = await guest.take(DESTINATION)
            cuts = agents.cutter.cuts if agents.cutter else 0
    finally:
        await guest.end()
    unmoved, unmoved_s = await _run_unmoved(guest, moved, show)
    evidence = Evidence(
        report=report,
        at_source=at_source,
        arrived=arrived,
        later=later,
        source_has_ended=source_has_ended,
        moved=moved if isinstance(moved, Standstill) else None,
        unmoved=unmoved,
        unmoved_s=unmoved_s,
    )
    proof = judge(evidence)
    # Whoever sees a proof fail wants to know why.
    scratch.is_kept |= not proof.holds
    return Outcome(
        demo=demo,
        report=report,
        proof=proof,
        evidence=evidence,
        cuts=cuts,
        folder=scratch.folder if scratch.is_kept else None,
    )


def _guest(demo: Demo, scratch: Scratch) -> DemoGuest:
    """Choose the kind of guest. Raises NoQemu."""
    if demo.kind is GuestKind.EMBEDDED:
        return EmbeddedDemoGuest(scratch, ram_bytes=demo.ram_bytes, dirty_bytes_per_s=demo.dirty_bytes_per_s)
    scratch.has_qemu = True
    return QemuDemoGuest(
        scratch,
        ram_bytes=demo.ram_bytes,
        dirty_bytes_per_s=demo.dirty_bytes_per_s,
        binary=find_qemu(),
        accel=best_accel(),
    )


async def _move(demo: Demo, agents: Agents, guest: DemoGuest, show: Show) -> tuple[Report, Look, bool]:
    """Move the guest, cut the link meanwhile, and look at it on the host that it leaves for as long as it is there."""
    show.begins(f"moving it to {DESTINATION}")
    fleet = Fleet(agents.settings)
    saboteur = _Saboteur(demo, guest.content_bytes, fleet, agents.cutter) if agents.cutter else None

    def on_progress(view: JobView) -> None:
        show.moving(view)
        if saboteur:
            saboteur.heard(view)

    async with guest.watching(SOURCE) as watcher, anyio.create_task_group() as tasks:
        tasks.start_soon(watcher.watch)
        if saboteur:
            tasks.start_soon(saboteur.lift_cap)
        report = await fleet.move(
            guest.guest_id,
            DESTINATION,
            is_offline=demo.is_offline,
            bandwidth_bytes_per_s=saboteur.cap_bytes_per_s if saboteur else demo.link_bytes_per_s,
            compression=saboteur.compression if saboteur else demo.compression,
            audit=True,
            on_progress=on_progress,
        )
        tasks.cancel_scope.cancel()
        has_ended = watcher.has_ended()
    cuts = f", though the link was cut {agents.cutter.cuts} times" if agents.cutter else ""
    stopped = approx_duration(report.downtime.total_s) if report.downtime else "unknown"
    show.done(f"it moved to {DESTINATION} in {approx_duration(report.total_s)}, stopped for {stopped}{cuts}")
    return report, watcher.last, has_ended


async def _run_unmoved(guest: DemoGuest, moved: object, show: Show) -> tuple[Standstill | None, float | None]:
    """Run the same guest once more from boot, without a move, where that is the same."""
    if not isinstance(moved, Standstill):
        return None, None
    what = "running the same guest again, without a move"
    show.begins(what)
    ran = await guest.run_unmoved(moved, lambda so_far: show.begins(f"{what}: {so_far}"))
    if ran is None or not isinstance(ran[0], Standstill):
        return None, None
    show.done(f"the same guest ran again without a move: {moved.instructions} instructions")
    return ran[0], ran[1]


class _Saboteur:
    """Cuts the link as planned. Until the last cut the link has a cap, so that there is a transfer to cut."""

    def __init__(self, demo: Demo, content_bytes: int, fleet: Fleet, cutter: Cutter) -> None:
        self._demo = demo
        self._fleet = fleet
        self._cutter = cutter
        self._plan = CutPlan(demo.link_cuts)
        self._job = ""
        self._is_over = anyio.Event()
        # A link that is slow enough to be cut is one that `auto` would soon compress for.
        self.compression: Final = demo.compression or Compression.ZSTD
        ratio = COMPRESSION_RATIOS[self.compression]
        longest = int(content_bytes / ratio / (CUT_PART_S * (demo.link_cuts + 1)))
        self.cap_bytes_per_s: Final = min(demo.link_bytes_per_s or longest, longest)

    def heard(self, view: JobView) -> None:
        self._job = view.job
        if self._cutter.cuts >= self._demo.link_cuts:
            self._is_over.set()
        elif self._plan.is_due(
            round_number=view.progress.round_number,
            remaining_pages=view.progress.remaining_pages,
            made=self._cutter.cuts,
            now_s=anyio.current_time(),
        ):
            self._cutter.cut_soon()

    async def lift_cap(self) -> None:
        await self._is_over.wait()
        # A move that has ended meanwhile needs no limit lifted.
        with contextlib.suppress(RequestRefused):
            async with self._fleet.connect(SOURCE) as agent:
                await agent.set_limits(self._job, bandwidth_bytes_per_s=self._demo.link_bytes_per_s or 0)


def _known_causes(exc: BaseException) -> tuple[str, ...] | None:
    """Give a sentence for each error in `exc`, or None if one of them is none that the world can cause."""
    if isinstance(exc, BaseExceptionGroup):
        causes = [_known_causes(inner) for inner in exc.exceptions]
        return (
            None
            if None in causes
            else tuple(dict.fromkeys(one for found in causes if found for one in found))
        )
    if isinstance(exc, AgentError | MigrationError | TransportError | OSError):
        return (str(exc) or type(exc).__name__,)
    return None
