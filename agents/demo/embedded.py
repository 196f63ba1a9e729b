"""The demo with an embedded guest, which is deterministic: moved or not, it is the same to the byte.

Law: the story is `run`'s; here is what is particular to this kind of guest.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from agents.demo.guests import Look
from agents.demo.proof import Standstill
from agents.demo.scratch import HOSTS, Scratch
from agents.hypervisors.embedded.client import (
    FINGERPRINT_TIMEOUT_S,
    Description,
    GuestClient,
    start_guest,
)
from agents.hypervisors.embedded.devices import SECTOR_BYTES, MemorySectors
from agents.hypervisors.embedded.errors import EmbeddedError, GuestGone
from agents.hypervisors.embedded.replay import replay
from agents.hypervisors.embedded.rundir import GuestPaths, clean_stale, guest_ids
from agents.hypervisors.embedded.spec import PAGE_BYTES, EmbeddedSpec, Pattern
from agents.hypervisors.processes import has_ended
from agents.units import approx_size

__all__ = ["EmbeddedDemoGuest"]

DISK_BYTES: Final = 1 << 20
# Long enough to be past its start, short enough that nobody waits for it.
RUN_BEFORE_S: Final = 1.0
LOOK_EVERY_S: Final = 0.2
# The program runs some ten times faster than at its pace, so that only a demo of many minutes comes near this.
UNMOVED_TIMEOUT_S: Final = 300.0

T = TypeVar("T")


class EmbeddedDemoGuest:
    """`agents.demo.guests.DemoGuest`."""

    def __init__(self, scratch: Scratch, *, ram_bytes: int, dirty_bytes_per_s: int) -> None:
        half = ram_bytes // 2 // PAGE_BYTES * PAGE_BYTES
        self._scratch = scratch
        self._spec = EmbeddedSpec(
            guest_id=str(uuid.uuid4()),
            name="demo",
            ram_bytes=ram_bytes,
            pattern=Pattern.HOT,
            dirty_bytes_per_s=dirty_bytes_per_s,
            working_set_bytes=half // 2 // PAGE_BYTES * PAGE_BYTES,
            fill_bytes=half,
            disk_path=str(scratch.shared / "demo.img"),
        )

    @property
    def guest_id(self) -> str:
        return self._spec.guest_id

    @property
    def content_bytes(self) -> int:
        return self._spec.fill_bytes

    @property
    def sentence(self) -> str:
        spec = self._spec
        return f"{approx_size(spec.ram_bytes)} of RAM, writes {approx_size(spec.dirty_bytes_per_s)}/s"

    async def start(self, host: str) -> None:
        """Start it, and let it run a little."""
        await anyio.Path(self._disk).write_bytes(bytes(DISK_BYTES))
        await anyio.to_thread.run_sync(start_guest, self._spec, self._scratch.guests_dir(host))
        await anyio.sleep(RUN_BEFORE_S)

    @contextlib.asynccontextmanager
    async def watching(self, host: str) -> AsyncIterator[_Watcher]:
        """Look at it on a host that it leaves."""
        async with self._connected(host) as client:
            pidfd = os.pidfd_open(client.pid)
            try:
                yield _Watcher(client, await _in_thread(client.describe), pidfd)
            finally:
                os.close(pidfd)

    async def look(self, host: str) -> Look:
        """Ask it once."""
        async with self._connected(host) as client:
            return _look(await _in_thread(client.describe))

    async def take(self, host: str) -> Standstill:
        """Stop it and take its RAM's fingerprint, registers, devices and disk."""
        async with self._connected(host) as client:
            await _in_thread(client.pause)
            stopped = await _in_thread(client.describe)
            return Standstill(
                instructions=stopped.instructions,
                ram=await _in_thread(client.fingerprint),
                device_state=await _in_thread(client.save_state),
                disk=await anyio.Path(self._disk).read_bytes(),
            )

    async def run_unmoved(
        self, taken: object, tell: Callable[[str], None]
    ) -> tuple[Standstill, float] | None:
        """Run the same guest once more from boot, for as many instructions."""
        if not isinstance(taken, Standstill):
            return None
        instructions = taken.instructions
        sectors = MemorySectors()
        done = 0
        is_unwanted = False

        def on_progress(instructions_done: int) -> None:
            nonlocal done
            done = instructions_done
            if is_unwanted:
                raise InterruptedError("nobody waits for this run any more")

        async def tell_progress() -> None:
            while True:
                await anyio.sleep(LOOK_EVERY_S)
                tell(f"{100 * done // instructions} %")

        started_s = anyio.current_time()
        try:
            with anyio.fail_after(UNMOVED_TIMEOUT_S):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(tell_progress)
                    ram, device_state = await anyio.to_thread.run_sync(
                        lambda: replay(self._spec, instructions, sectors=sectors, on_progress=on_progress),
                        abandon_on_cancel=True,
                    )
                    tasks.cancel_scope.cancel()
        finally:
            is_unwanted = True
        unmoved_s = anyio.current_time() - started_s
        disk = b"".join(sectors.read(sector) or b"" for sector in range(DISK_BYTES // SECTOR_BYTES))
        unmoved = Standstill(instructions=instructions, ram=ram, device_state=device_state, disk=disk)
        return unmoved, unmoved_s

    async def end(self) -> None:
        """End it at either host. Not cancelled by anything."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(end_embedded_guests, self._scratch)

    @property
    def _disk(self) -> str:
        return self._spec.disk_path or ""

    @contextlib.asynccontextmanager
    async def _connected(self, host: str) -> AsyncIterator[GuestClient]:
        paths = GuestPaths.of_guest(self._scratch.guests_dir(host), self._spec.guest_id)
        client = await _in_thread(lambda: GuestClient(paths.socket, timeout_s=FINGERPRINT_TIMEOUT_S))
        try:
            yield client
        finally:
            client.close()


class _Watcher:
    """`agents.demo.guests.Watcher`."""

    def __init__(self, client: GuestClient, first: Description, pidfd: int) -> None:
        self._client = client
        self._pidfd = pidfd
        self.last = _look(first)

    async def watch(self) -> None:
        with contextlib.suppress(GuestGone):
            while True:
                await anyio.sleep(LOOK_EVERY_S)
                self.last = _look(await _in_thread(self._client.describe))

    def has_ended(self) -> bool:
        return has_ended(self._pidfd)


def end_embedded_guests(scratch: Scratch) -> None:
    """End every embedded guest that is left at either host. Blocking."""
    for host in HOSTS:
        for guest_id in list(guest_ids(scratch.guests_dir(host))):
            paths = GuestPaths.of_guest(scratch.guests_dir(host), guest_id)
            # One that has ended by itself is what is wanted.
            with contextlib.suppress(EmbeddedError):
                client = GuestClient(paths.socket)
                try:
                    client.quit()
                    client.await_end()
                finally:
                    client.close()
            clean_stale(paths)


def _look(described: Description) -> Look:
    return Look(
        ticks=described.ticks,
        work=described.instructions,
        work_unit="instructions",
        written=described.pages_written,
        errors=described.errors,
        is_running=described.is_running,
        state=described.state,
        problem=described.fault,
    )


async def _in_thread(call: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(call)
