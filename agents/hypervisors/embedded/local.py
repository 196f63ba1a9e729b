"""Embedded guests of this host, for `vmferry guest`.

Law: talks to guests' own sockets below one directory, as an agent does; no network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import anyio.to_thread

from agents.hypervisors.embedded.client import Description, GuestClient, start_guest
from agents.hypervisors.embedded.errors import EmbeddedError, GuestGone
from agents.hypervisors.embedded.rundir import GuestPaths, clean_stale, guest_ids
from agents.hypervisors.embedded.spec import EmbeddedSpec
from agents.hypervisors.local import LocalGuest

__all__ = ["LocalEmbedded"]


class LocalEmbedded:
    """`agents.hypervisors.local.LocalHypervisor` of one directory."""

    def __init__(self, guests_dir: Path) -> None:
        self.place = guests_dir

    async def guests(self) -> list[LocalGuest]:
        """List them; one that ends while we look is not here."""
        return await anyio.to_thread.run_sync(self._guests)

    async def start(self, description: Path) -> LocalGuest:
        """Boot a guest. Raises EmbeddedError."""
        spec = EmbeddedSpec.from_toml(description)
        pid = await anyio.to_thread.run_sync(start_guest, spec, self.place)
        return LocalGuest(
            kind="embedded",
            guest_id=spec.guest_id,
            name=spec.name,
            state="running",
            pid=pid,
            ram_bytes=spec.ram_bytes,
            cpu_model=spec.cpu_model,
        )

    async def stop(self, guest: LocalGuest, *, now: bool, timeout_s: float) -> None:
        """End it at once: it has no operating system that could be asked. Raises EmbeddedError."""

        def end() -> None:
            with self._connected(guest.guest_id) as client:
                client.quit()
                client.await_end()

        await anyio.to_thread.run_sync(end)

    async def console_text(self, guest: LocalGuest) -> str:
        """Give its last lines. Raises EmbeddedError."""

        def describe() -> Description:
            with self._connected(guest.guest_id) as client:
                return client.describe()

        described = await anyio.to_thread.run_sync(describe)
        return described.console_tail.decode("utf-8", "replace")

    def console_socket(self, guest: LocalGuest) -> Path | None:
        """None: its console only speaks."""
        return None

    def _guests(self) -> list[LocalGuest]:
        found = []
        for guest_id in guest_ids(self.place):
            with contextlib.suppress(EmbeddedError), self._connected(guest_id) as client:
                found.append(_shown(client.describe()))
        return found

    @contextlib.contextmanager
    def _connected(self, guest_id: str) -> Iterator[GuestClient]:
        paths = GuestPaths.of_guest(self.place.absolute(), guest_id)
        try:
            client = GuestClient(paths.socket)
        except GuestGone:
            clean_stale(paths)
            raise
        with contextlib.closing(client):
            yield client


def _shown(described: Description) -> LocalGuest:
    spec = described.spec
    return LocalGuest(
        kind="embedded",
        guest_id=spec.guest_id,
        name=spec.name,
        state=described.state,
        pid=described.pid,
        ram_bytes=spec.ram_bytes,
        cpu_model=spec.cpu_model,
        problem=described.fault,
        details={
            "fault": described.fault or None,
            "instructions": described.instructions,
            "ticks": described.ticks,
            "pages_written": described.pages_written,
            "errors": described.errors,
        },
    )
