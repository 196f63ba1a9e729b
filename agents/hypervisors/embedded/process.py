"""The guest's process: runs the machine at its pace and answers the control socket.

Law: the only module with this process's threads and clock. Threads: the main one runs slices; `accept` and one per
connection (`control`); `sigterm` waits for the signal. One lock guards the machine: whoever has it has a machine that
stands between two slices. A guest that is the only copy is never ended but by `quit`, SIGTERM or its own death.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from enum import StrEnum
from typing import Final

import numpy as np

from agents.hypervisors.embedded.control import Answer, ControlServer, Verb
from agents.hypervisors.embedded.devices import FileSectors, NoSectors, Sectors
from agents.hypervisors.embedded.errors import MachineFault, RequestRefused, StateInvalid
from agents.hypervisors.embedded.fingerprint import ram_fingerprint
from agents.hypervisors.embedded.machine import Machine
from agents.hypervisors.embedded.program import instructions_per_s
from agents.hypervisors.embedded.ramfile import RamFile
from agents.hypervisors.embedded.spec import PAGE_BYTES, EmbeddedSpec
from memory.errors import TrackerError
from memory.uffd_wp import open_uffd

__all__ = ["GuestProcess", "Pace", "State"]

# Short enough that a pause, which waits for the slice under way, stays within a downtime of some milliseconds; long
# enough that the 30 us which a slice costs on top do not matter.
SLICE_S: Final = 0.005
# At 30-50 M instructions/s about one slice's time: a guest that is told to be faster than its CPU stays stoppable.
MAX_SLICE_INSTRUCTIONS: Final = 100_000
# A guest that was not scheduled for a while catches up so much at once and forgives the rest.
MAX_BEHIND_SLICES: Final = 4
# Between two slices the lock is free at least so long, or a guest that is always behind would keep it for ever.
_MIN_GAP_S: Final = 0.0002
# The driver says `hold` in the first millisecond; this is for one that was killed before it could.
_HOLD_DEADLINE_S: Final = 10.0

_log = logging.getLogger(__name__)


class State(StrEnum):
    """What the guest does."""

    INCOMING = "incoming"  # no device state yet: nothing that could be lost
    LOADED = "loaded"  # device state is in, and it has not run here: its agent may come back for it
    PAUSED = "paused"
    RUNNING = "running"
    FAULTED = "faulted"  # its CPU cannot go on


class Pace:
    """How many instructions are due. Pure: time comes in as a number."""

    def __init__(self, instructions_per_s: float) -> None:
        self._per_s = instructions_per_s
        self._anchor_s = 0.0
        self._executed = 0

    def restart(self, now_s: float) -> None:
        """Count from now on."""
        self._anchor_s = now_s
        self._executed = 0

    def due(self, now_s: float) -> int:
        """Give the next slice; what is more than MAX_BEHIND_SLICES behind is forgiven."""
        due = int((now_s - self._anchor_s) * self._per_s) - self._executed
        most = int(self._per_s * SLICE_S * MAX_BEHIND_SLICES) + 1
        if due > most:
            self._executed += due - most
            due = most
        return max(min(due, MAX_SLICE_INSTRUCTIONS), 0)

    def executed(self, instructions: int) -> None:
        self._executed += instructions


class GuestProcess:
    """One guest. `run` is called once, from the main thread, and ends with the guest.

    Args:
        is_incoming: begin empty and stopped, and end if the connection that said `hold` closes before `load_state`.

    Raises:
        GuestGone: the world's: no memory, or no disk.
    """

    def __init__(self, spec: EmbeddedSpec, *, is_incoming: bool) -> None:
        self._spec = spec
        self.ram = RamFile(spec.ram_bytes)
        self._sectors: Sectors = FileSectors(spec.disk_path) if spec.disk_path is not None else NoSectors()
        self._machine = Machine(spec, self.ram, self._sectors)
        self._turn = threading.Condition(threading.Lock())
        self._state = State.INCOMING if is_incoming else State.RUNNING
        self._fault = ""
        self._is_quitting = False
        self._holder: int | None = None
        self._hold_until_s = time.monotonic() + _HOLD_DEADLINE_S
        self._pace = Pace(instructions_per_s(spec))
        self._written: bytearray | None = None
        self._tracking = "none"
        if not is_incoming:
            self._machine.boot()

    def serve(self, listener: socket.socket) -> None:
        """Begin to answer on `listener`, and to obey SIGTERM, in threads. All threads have SIGTERM blocked."""
        threading.Thread(target=self._await_sigterm, name="sigterm", daemon=True).start()
        ControlServer(listener, self.answer, self.connection_closed).start()

    def run(self) -> None:
        """Run the guest until it is told to end."""
        self._pace.restart(time.monotonic())
        with self._turn:
            while not self._is_quitting:
                started_s = time.monotonic()
                if self._state is State.RUNNING and not self._machine.has_ended:
                    self._run_slice(started_s)
                    spent_s = time.monotonic() - started_s
                    self._turn.wait(max(SLICE_S - spent_s, _MIN_GAP_S))
                elif self._state is State.INCOMING and self._holder is None:
                    if started_s >= self._hold_until_s:
                        _log.warning("nobody holds this incoming guest: ending")
                        return
                    self._turn.wait(self._hold_until_s - started_s)
                else:
                    self._turn.wait()
        _log.info("ended state=%s instructions=%d", self._state, self._machine.instructions)

    def close(self) -> None:
        """Let go of RAM and disk, after `run`."""
        self._sectors.close()
        self.ram.close()

    def answer(self, verb: Verb, argument: bytes, connection: int) -> Answer:
        """Obey one request; called from the connections' threads.

        Raises:
            RequestRefused: theirs: not in this state.
        """
        with self._turn:
            match verb:
                case Verb.DESCRIBE:
                    return Answer(body=self._description())
                case Verb.RAM:
                    return Answer(body={"ram_bytes": self.ram.ram_bytes}, fds=(self.ram.fd,))
                case Verb.TRACK:
                    return self._track()
                case Verb.HOOK_START:
                    self._start_hook()
                case Verb.HOOK_HARVEST:
                    return Answer(body={"bitmap": self._harvest_hook()})
                case Verb.HOOK_STOP:
                    self._stop_hook()
                case Verb.PAUSE:
                    self._pause()
                case Verb.RESUME:
                    self._resume()
                case Verb.SAVE_STATE:
                    self._need_paused(verb)
                    return Answer(body={"state": self._machine.save_state()})
                case Verb.LOAD_STATE:
                    self._load_state(argument)
                case Verb.FINGERPRINT:
                    self._need_paused(verb)
                    return Answer(body={"fingerprint": ram_fingerprint(self.ram.fd, self.ram.ram_bytes)})
                case Verb.HOLD:
                    self._holder = connection
                    self._turn.notify_all()
                case Verb.QUIT:
                    self._quit("told to")
            return Answer(body={})

    def connection_closed(self, connection: int) -> None:
        """Notice that a connection ended; called from its thread."""
        with self._turn:
            if self._state is State.INCOMING and self._holder == connection:
                self._quit("the agent that prepared it is gone, and nothing was loaded")

    def _run_slice(self, now_s: float) -> None:
        try:
            self._pace.executed(self._machine.run_slice(self._pace.due(now_s)))
        except MachineFault as exc:
            self._state = State.FAULTED
            self._fault = str(exc)
            _log.error("%s", exc)

    def _description(self) -> dict[str, object]:
        counters = self._machine.counters()
        return {
            "spec": self._spec.to_bytes(),
            "pid": os.getpid(),
            "state": str(self._state),
            "fault": self._fault,
            "instructions": self._machine.instructions,
            "has_ended": self._machine.has_ended,
            "ticks": counters.ticks,
            "pages_written": counters.pages_written,
            "errors": counters.errors,
            "heartbeats": counters.heartbeats,
            "console_tail": bytes(self._machine.console.tail),
            "tracking": self._tracking,
        }

    def _track(self) -> Answer:
        try:
            uffd = open_uffd()
        except TrackerError as exc:
            raise RequestRefused(str(exc)) from exc
        self._tracking = "uffd-wp"
        _log.info("tracking method=uffd-wp")
        # Closed here once it is sent: the kernel ends the tracking by itself when the agent dies.
        body: dict[str, object] = {"address": self.ram.address, "pages": self.ram.ram_bytes // PAGE_BYTES}
        return Answer(body=body, fds_to_close=(uffd,))

    def _start_hook(self) -> None:
        pages = self.ram.ram_bytes // PAGE_BYTES
        written = bytearray(pages)

        def see(address: int, size: int) -> None:
            written[address // PAGE_BYTES] = 1
            written[min((address + size - 1) // PAGE_BYTES, pages - 1)] = 1

        self._written = written
        self._machine.watch_writes(see)
        self._tracking = "write-hook"
        _log.info("tracking method=write-hook")

    def _harvest_hook(self) -> bytes:
        if self._written is None:
            raise RequestRefused("the write hook is not set")
        flags = np.frombuffer(self._written, np.uint8)
        bitmap = np.packbits(flags, bitorder="little").tobytes()
        flags.fill(0)
        return bitmap

    def _stop_hook(self) -> None:
        if self._written is not None:
            self._machine.watch_writes(None)
            self._written = None
            self._tracking = "none"

    def _pause(self) -> None:
        if self._state is State.INCOMING:
            raise RequestRefused("this guest is empty: it waits for its device state")
        if self._state is State.RUNNING:
            self._state = State.PAUSED

    def _resume(self) -> None:
        if self._state is State.RUNNING:
            return
        self._need_paused(Verb.RESUME)
        self._state = State.RUNNING
        self._pace.restart(time.monotonic())
        self._turn.notify_all()

    def _load_state(self, state: bytes) -> None:
        if self._state is not State.INCOMING:
            raise RequestRefused(
                f"device state can only be loaded into an incoming guest; this one is {self._state}"
            )
        try:
            self._machine.load_state(state)
        except StateInvalid as exc:
            # Part of it may be in the CPU: this machine must never run. It stays incoming, and ends with its holder.
            raise RequestRefused(str(exc)) from exc
        self._state = State.LOADED
        _log.info("loaded instructions=%d", self._machine.instructions)

    def _need_paused(self, verb: Verb) -> None:
        if self._state not in (State.PAUSED, State.LOADED):
            raise RequestRefused(f"{verb} needs a paused guest; this one is {self._state}")

    def _quit(self, because: str) -> None:
        _log.info("ending because=%r", because)
        self._is_quitting = True
        self._turn.notify_all()

    def _await_sigterm(self) -> None:
        signal.sigwait([signal.SIGTERM])
        with self._turn:
            self._quit("SIGTERM")
