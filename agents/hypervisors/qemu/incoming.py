"""An empty QEMU at the destination: RAM comes from the engine, device state is loaded last.

Law: nothing of the device state reaches QEMU before `load_device_state`: loading it reads the guest's RAM (virtio's
rings), which must be whole by then. Its disks stay the source's (`late-block-activate`) until `resume`.
"""

from __future__ import annotations

import contextlib
from typing import Final

import anyio.to_thread

from agents.hypervisors.qemu.describe import run_state
from agents.hypervisors.qemu.devicestream import StreamEnd
from agents.hypervisors.qemu.errors import QemuError, QmpFailed
from agents.hypervisors.qemu.guest import Hold, OpenGuest
from agents.hypervisors.qemu.qmp import Qmp, field_of
from memory.runs import whole
from migrate.errors import GuestRefused

__all__ = ["QemuIncomingGuest"]

_CAPABILITIES: Final = ("x-ignore-shared", "events", "late-block-activate")
# Loading some MiB of device state; a host that is very busy takes seconds.
LOAD_TIMEOUT_S: Final = 30.0
# Activating disks takes their locks and reads their metadata.
RESUME_TIMEOUT_S: Final = 20.0
# QEMU's own: the first announcement at once, then some more, so that a switch that missed one learns.
_ANNOUNCE: Final = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


class QemuIncomingGuest(OpenGuest):
    """`migrate.ports.IncomingGuest`."""

    def __init__(self, held: Hold) -> None:
        super().__init__(held)
        self._stream: StreamEnd | None = None
        self._is_loaded = False
        self._has_run = False

    async def await_state(self) -> None:
        """Make it ready for the engine: RAM all holes, and QEMU waiting for its stream.

        Machine initialisation has written to RAM; whatever the source has as a hole must be one here.
        """
        await anyio.to_thread.run_sync(self.ram.scatter_zeros, whole(self.ram.total_pages))
        qmp = self._qmp
        await qmp.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": True} for name in _CAPABILITIES]},
        )
        self._stream = await StreamEnd.open(qmp)
        await qmp.execute("migrate-incoming", {"uri": self._stream.uri})

    async def load_device_state(self, state: bytes) -> None:
        """Load it after the last page. Raises GuestRefused: it does not fit this machine, which must not run then."""
        stream = self._stream
        if stream is None:
            raise GuestRefused(
                "this machine was not prepared here: there is no way to give it a device state"
            )
        try:
            await stream.send(state)
            await stream.finish()
            await self._loaded()
            self._is_loaded = True
        except QemuError as exc:
            raise GuestRefused(f"QEMU does not take the guest's device state: {exc}") from exc
        finally:
            self._stream = None
            await stream.aclose()

    async def resume(self) -> None:
        """Run it. May be called twice. Raises GuestRefused: no instruction was executed."""
        try:
            if not self._is_loaded and await run_state(self._qmp) == "inmigrate":
                raise GuestRefused("this machine has no device state: it cannot run")
            # An answer that does not come leaves open whether it runs: that error passes as it is.
            await self._qmp.execute("cont", timeout_s=RESUME_TIMEOUT_S)
        except QmpFailed as exc:
            raise GuestRefused(f"QEMU does not let the guest run: {exc}") from exc
        self._has_run = True

    async def release(self) -> None:
        """Let go of it; one that runs is a guest of this host now, and the network is told. May be called twice."""
        if self._stream is not None:
            await self._stream.aclose()
            self._stream = None
        if self._has_run and self._held.is_open:
            self._held.paths.incoming.unlink(missing_ok=True)
            # Not before it runs: until then another host may be the one whose ports the network should know.
            with contextlib.suppress(QemuError):
                await self._qmp.execute("announce-self", _ANNOUNCE)
        await super().release()

    @property
    def _qmp(self) -> Qmp:
        return self._held.qmp

    async def _loaded(self) -> None:
        event = await self._qmp.wait_event(
            "MIGRATION", lambda data: data.get("status") in ("completed", "failed"), timeout_s=LOAD_TIMEOUT_S
        )
        if field_of(event, "data", "status") == "failed":
            why = field_of(await self._qmp.execute("query-migrate"), "error-desc")
            raise QmpFailed("migrate-incoming", "failed", str(why or "its log says why"))
