"""The demo's story, from top to bottom: a guest moves from host-a to host-b while it runs, and that is proved.

Law: whoever calls decides what is shown and how it is ended: cancel `run_demo`, and it cleans up and is gone.

Tasks: one looks at the guest on host-a while it is moved, one lifts the bandwidth cap after the last cut of the
link; both end with the move. Those of the agents' processes are `scratch`'s.
"""

from __future__ import annotations

import contextlib
import os
import select
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol, TypeVar

import anyio
import anyio.to_thread

from agents.api import JobView
from agents.client import Fleet
from agents.config import EventLoop
from agents.demo.cutter import CutPlan, Cutter
from agents.demo.errors import DemoFailed
from agents.demo.proof import Evidence, Proof, Standstill, judge
from agents.demo.scratch import DESTINATION, SOURCE, Agents, Scratch, end_guests, open_scratch, running_agents
from agents.errors import AgentError, RequestRefused
from agents.hypervisors.embedded.client import (
    FINGERPRINT_TIMEOUT_S,
    Description,
    GuestClient,
    start_guest,
)
from agents.hypervisors.embedded.devices import SECTOR_BYTES, MemorySectors
from agents.hypervisors.embedded.errors import GuestGone
from agents.hypervisors.embedded.replay import replay
from agents.hypervisors.embedded.rundir import GuestPaths
from agents.hypervisors.embedded.spec import PAGE_BYTES, EmbeddedSpec, Pattern
from agents.units import approx_duration, approx_size
from migrate.compression import Compression
from migrate.errors import MigrationError
from migrate.stats import Report
from transport.errors import TransportError

__all__ = ["MIN_RAM_BYTES", "Demo", "Outcome", "Show", "least_ram_bytes", "run_demo"]

# Below this the content and the working set would be a handful of pages.
MIN_RAM_BYTES: Final = 4 << 20
DISK_BYTES: Final = 1 << 20
# Long enough to be past its start, short enough that nobody waits for it.
RUN_BEFORE_S: Final = 1.0
RUN_AFTER_S: Final = 0.5
LOOK_EVERY_S: Final = 0.2
# What a first pass takes for each part between two cuts; see MIN_CUT_GAP_S.
CUT_PART_S: Final = 0.5
# What its content becomes on the wire: 7 to 8 times smaller where it is compressed; `auto` begins without, as long as
# it does not know the link. With less than this the transfer would be over before the last cut.
COMPRESSION_RATIOS: Final = MappingProxyType({Compression.OFF: 1, Compression.AUTO: 4, Compression.ZSTD: 8})
# Two batches of pages of its content: with less between two cuts nothing would ever arrive whole.
RAM_BYTES_PER_CUT: Final = 4 << 20
# Of less, all that is sent fits into the burst of the cap and the sockets' buffers, and is gone before it can be cut.
MIN_CUT_RAM_BYTES: Final = 64 << 20
# The program runs some ten times faster than at its pace, so that only a demo of many minutes comes near this.
UNMOVED_TIMEOUT_S: Final = 300.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What is asked for. `link_cuts` is how often the link is cut; None is no cap, and the agents' default."""

    ram_bytes: int
    dirty_bytes_per_s: int
    link_bytes_per_s: int | None = None
    is_offline: bool = False
    link_cuts: int = 0
    compression: Compression | None = None
    event_loop: EventLoop = EventLoop.ASYNCIO
    keep: bool = False


def least_ram_bytes(link_cuts: int) -> int:
    """Give the RAM that a guest must have for its link to be cut so often while it is moved."""
    if not link_cuts:
        return MIN_RAM_BYTES
    return max(MIN_CUT_RAM_BYTES, RAM_BYTES_PER_CUT * (link_cuts + 1))


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
    show.begins("starting two agents")
    try:
        async with running_agents(
            scratch, event_loop=demo.event_loop, with_cutter=demo.link_cuts > 0
        ) as agents:
            show.done(f"two agents, {SOURCE} and {DESTINATION}, trust each other's certificates")
            spec = await _start(demo, scratch, show)
            report, at_source, source_has_ended = await _move(demo, scratch, agents, spec, show)
            arrived, later, moved = await _look_after(scratch, spec, show)
            cuts = agents.cutter.cuts if agents.cutter else 0
    finally:
        await end_guests(scratch)
    unmoved, unmoved_s = await _run_unmoved(spec, moved.instructions, show)
    evidence = Evidence(
        report=report,
        at_source=at_source,
        arrived=arrived,
        later=later,
        source_has_ended=source_has_ended,
        moved=moved,
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


async def _start(demo: Demo, scratch: Scratch, show: Show) -> EmbeddedSpec:
    """Start the guest at the source, and let it run a little."""
    spec = _spec(demo, scratch)
    content = f"{approx_size(demo.ram_bytes)} of RAM, writes {approx_size(demo.dirty_bytes_per_s)}/s"
    show.begins(f"starting a guest on {SOURCE}: {content}")
    await anyio.Path(spec.disk_path or "").write_bytes(bytes(DISK_BYTES))
    await anyio.to_thread.run_sync(start_guest, spec, scratch.guests_dir(SOURCE))
    await anyio.sleep(RUN_BEFORE_S)
    show.done(f"a guest runs on {SOURCE}: {content}")
    return spec


def _spec(demo: Demo, scratch: Scratch) -> EmbeddedSpec:
    half = demo.ram_bytes // 2 // PAGE_BYTES * PAGE_BYTES
    return EmbeddedSpec(
        guest_id=str(uuid.uuid4()),
        name="demo",
        ram_bytes=demo.ram_bytes,
        pattern=Pattern.HOT,
        dirty_bytes_per_s=demo.dirty_bytes_per_s,
        working_set_bytes=half // 2 // PAGE_BYTES * PAGE_BYTES,
        fill_bytes=half,
        disk_path=str(scratch.shared / "demo.img"),
    )


async def _move(
    demo: Demo, scratch: Scratch, agents: Agents, spec: EmbeddedSpec, show: Show
) -> tuple[Report, Description, bool]:
    """Move the guest, cut the link meanwhile, and look at it on the host that it leaves for as long as it is there."""
    show.begins(f"moving it to {DESTINATION}")
    fleet = Fleet(agents.settings)
    saboteur = _Saboteur(demo, spec, fleet, agents.cutter) if agents.cutter else None

    def on_progress(view: JobView) -> None:
        show.moving(view)
        if saboteur:
            saboteur.heard(view)

    async with (
        _looking_at(scratch, SOURCE, spec) as client,
        _process_of(client) as process,
        anyio.create_task_group() as tasks,
    ):
        watch = _Watch(client, await _in_thread(client.describe))
        tasks.start_soon(watch.look)
        if saboteur:
            tasks.start_soon(saboteur.lift_cap)
        report = await fleet.move(
            spec.guest_id,
            DESTINATION,
            is_offline=demo.is_offline,
            bandwidth_bytes_per_s=saboteur.cap_bytes_per_s if saboteur else demo.link_bytes_per_s,
            compression=saboteur.compression if saboteur else demo.compression,
            audit=True,
            on_progress=on_progress,
        )
        tasks.cancel_scope.cancel()
        has_ended = process.has_ended()
    cuts = f", though the link was cut {agents.cutter.cuts} times" if agents.cutter else ""
    stopped = approx_duration(report.downtime.total_s) if report.downtime else "unknown"
    show.done(f"it moved to {DESTINATION} in {approx_duration(report.total_s)}, stopped for {stopped}{cuts}")
    return report, watch.last, has_ended


class _Watch:
    """Looks at the guest on the host that it leaves, until it is gone from there."""

    def __init__(self, client: GuestClient, first: Description) -> None:
        self._client = client
        self.last = first

    async def look(self) -> None:
        with contextlib.suppress(GuestGone):
            while True:
                await anyio.sleep(LOOK_EVERY_S)
                self.last = await _in_thread(self._client.describe)


class _Saboteur:
    """Cuts the link as planned. Until the last cut the link has a cap, so that there is a transfer to cut."""

    def __init__(self, demo: Demo, spec: EmbeddedSpec, fleet: Fleet, cutter: Cutter) -> None:
        self._demo = demo
        self._fleet = fleet
        self._cutter = cutter
        self._plan = CutPlan(demo.link_cuts)
        self._job = ""
        self._is_over = anyio.Event()
        # A link that is slow enough to be cut is one that `auto` would soon compress for.
        self.compression: Final = demo.compression or Compression.ZSTD
        ratio = COMPRESSION_RATIOS[self.compression]
        longest = int(spec.fill_bytes / ratio / (CUT_PART_S * (demo.link_cuts + 1)))
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


async def _look_after(
    scratch: Scratch, spec: EmbeddedSpec, show: Show
) -> tuple[Description, Description, Standstill]:
    """Look at the guest at the destination while it runs on, then stop it and take all of it."""
    show.begins(f"watching it run on {DESTINATION}")
    async with _looking_at(scratch, DESTINATION, spec) as client:
        arrived = await _in_thread(client.describe)
        await anyio.sleep(RUN_AFTER_S)
        later = await _in_thread(client.describe)
        show.done(f"it runs on at {DESTINATION}: {later.pages_written} pages written, {later.errors} errors")
        await _in_thread(client.pause)
        stopped = await _in_thread(client.describe)
        moved = Standstill(
            instructions=stopped.instructions,
            ram=await _in_thread(client.fingerprint),
            device_state=await _in_thread(client.save_state),
            disk=await anyio.Path(spec.disk_path or "").read_bytes(),
        )
        return arrived, later, moved


async def _run_unmoved(spec: EmbeddedSpec, instructions: int, show: Show) -> tuple[Standstill, float]:
    """Run the same guest once more from boot, without a move; give it where it stands after as many instructions."""
    show.begins("running the same guest again, without a move")
    sectors = MemorySectors()
    done = 0
    is_unwanted = False

    def on_progress(instructions_done: int) -> None:
        nonlocal done
        done = instructions_done
        if is_unwanted:
            raise InterruptedError("nobody waits for this run any more")

    async def tell() -> None:
        while True:
            await anyio.sleep(LOOK_EVERY_S)
            show.begins(f"running the same guest again, without a move: {100 * done // instructions} %")

    started_s = anyio.current_time()
    try:
        with anyio.fail_after(UNMOVED_TIMEOUT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(tell)
                ram, device_state = await anyio.to_thread.run_sync(
                    lambda: replay(spec, instructions, sectors=sectors, on_progress=on_progress),
                    abandon_on_cancel=True,
                )
                tasks.cancel_scope.cancel()
    finally:
        is_unwanted = True
    unmoved_s = anyio.current_time() - started_s
    disk = b"".join(sectors.read(sector) or b"" for sector in range(DISK_BYTES // SECTOR_BYTES))
    show.done(f"the same guest ran again without a move: {instructions} instructions")
    unmoved = Standstill(instructions=instructions, ram=ram, device_state=device_state, disk=disk)
    return unmoved, unmoved_s


@asynccontextmanager
async def _looking_at(scratch: Scratch, host: str, spec: EmbeddedSpec) -> AsyncIterator[GuestClient]:
    paths = GuestPaths.of_guest(scratch.guests_dir(host), spec.guest_id)
    client = await _in_thread(lambda: GuestClient(paths.socket, timeout_s=FINGERPRINT_TIMEOUT_S))
    try:
        yield client
    finally:
        client.close()


class _Process:
    """A process that may end, and whose number may then be another's."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    def has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))


@asynccontextmanager
async def _process_of(client: GuestClient) -> AsyncIterator[_Process]:
    pidfd = os.pidfd_open(client.pid)
    try:
        yield _Process(pidfd)
    finally:
        os.close(pidfd)


async def _in_thread(call: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(call)


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
