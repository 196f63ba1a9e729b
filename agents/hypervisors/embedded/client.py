"""The agent's side of one guest's process: typed requests, and starting one.

Law: blocking; called from worker threads. What the guest's process says is checked before it is believed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agents.hypervisors.embedded.control import Body, ControlClient, Verb
from agents.hypervisors.embedded.errors import GuestGone, MessageInvalid, RequestRefused
from agents.hypervisors.embedded.rundir import GuestPaths, clean_stale, prepare_guests_dir
from agents.hypervisors.embedded.spec import EmbeddedSpec
from agents.hypervisors.processes import has_ended, run_to_end

__all__ = ["Description", "GuestClient", "launch_guest", "start_guest"]

# Longer than any request takes on a busy host: a slice for most.
REQUEST_TIMEOUT_S: Final = 10.0
# 64 GiB at 0.5 GiB/s, the slowest of the fingerprint's parts with a margin.
FINGERPRINT_TIMEOUT_S: Final = 128.0
# Booting writes the content: 64 GiB at 0.5 GiB/s; all else takes 0.2 s.
START_TIMEOUT_S: Final = 150.0
# Giving back 64 GiB of RAM is what takes long.
END_TIMEOUT_S: Final = 10.0
_MAX_SENTENCE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a guest's process says of itself. `state` is one of `process.State`."""

    spec: EmbeddedSpec
    pid: int
    state: str
    fault: str
    instructions: int
    has_ended: bool
    ticks: int
    pages_written: int
    errors: int
    heartbeats: int
    console_tail: bytes
    tracking: str

    @property
    def is_running(self) -> bool:
        return self.state == "running"

    @property
    def is_incoming(self) -> bool:
        """It has not run on this host yet."""
        return self.state in ("incoming", "loaded")


class GuestClient:
    """A connection to one guest's process. Threads may share it. Close it.

    Every call raises GuestGone when the process ended, RequestRefused when it says no.
    """

    def __init__(self, socket_path: Path, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self._control = ControlClient(socket_path, timeout_s=timeout_s)
        try:
            self.pid = self._control.peer_pid()
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as exc:
            self._control.close()
            raise GuestGone(f"the guest at {socket_path} has ended") from exc

    def describe(self) -> Description:
        """Ask for everything it knows of itself."""
        body = self._ask(Verb.DESCRIBE)
        return Description(
            spec=EmbeddedSpec.from_bytes(_bytes(body, "spec")),
            pid=self.pid,
            state=_text(body, "state"),
            fault=_text(body, "fault"),
            instructions=_number(body, "instructions"),
            has_ended=bool(body.get("has_ended")),
            ticks=_number(body, "ticks"),
            pages_written=_number(body, "pages_written"),
            errors=_number(body, "errors"),
            heartbeats=_number(body, "heartbeats"),
            console_tail=_bytes(body, "console_tail"),
            tracking=_text(body, "tracking"),
        )

    def ram_fd(self) -> int:
        """Get the file of its RAM; the caller owns the fd."""
        _, fd = self._ask_for_fd(Verb.RAM)
        return fd

    def track(self) -> tuple[int, int, int]:
        """Get (userfaultfd, address, pages) of its mapping of its RAM; the caller owns the fd."""
        body, fd = self._ask_for_fd(Verb.TRACK)
        try:
            return fd, _number(body, "address"), _number(body, "pages")
        except MessageInvalid:
            os.close(fd)
            raise

    def start_hook(self) -> None:
        self._ask(Verb.HOOK_START)

    def harvest_hook(self) -> bytes:
        """Take a bitmap of the pages written, one bit for each, least significant bit first."""
        return _bytes(self._ask(Verb.HOOK_HARVEST), "bitmap")

    def stop_hook(self) -> None:
        self._ask(Verb.HOOK_STOP)

    def pause(self) -> None:
        """Let the slice under way end; nothing is executed or written when this returns."""
        self._ask(Verb.PAUSE)

    def resume(self) -> None:
        self._ask(Verb.RESUME)

    def save_state(self) -> bytes:
        return _bytes(self._ask(Verb.SAVE_STATE), "state")

    def load_state(self, state: bytes) -> None:
        self._ask(Verb.LOAD_STATE, state)

    def fingerprint(self) -> bytes:
        """Give the fingerprint of the paused guest's RAM; connect with FINGERPRINT_TIMEOUT_S for this."""
        return _bytes(self._ask(Verb.FINGERPRINT), "fingerprint")

    def hold(self) -> None:
        """Tie an incoming guest to this connection: it ends with it, unless device state was loaded."""
        self._ask(Verb.HOLD)

    def quit(self) -> None:
        """Tell it to end; `await_end` waits for it. One that has ended before is no mistake."""
        # It may be gone before its answer leaves.
        with contextlib.suppress(GuestGone):
            self._ask(Verb.QUIT)

    def await_end(self) -> None:
        """Wait until the process has ended, after `quit`; one that cannot obey is killed.

        Raises:
            GuestGone: the world's: the kernel does not let it end.
        """
        if has_ended(self._pidfd, END_TIMEOUT_S):
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if not has_ended(self._pidfd, END_TIMEOUT_S):
            raise GuestGone(f"the guest's process {self.pid} does not end, not even by SIGKILL")

    def close(self) -> None:
        """May be called twice."""
        self._control.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _ask(self, verb: Verb, argument: bytes = b"") -> Body:
        body, fds = self._control.request(verb, argument)
        for fd in fds:
            os.close(fd)
        return body

    def _ask_for_fd(self, verb: Verb) -> tuple[Body, int]:
        body, fds = self._control.request(verb)
        if len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise MessageInvalid(f"the answer to {verb} has {len(fds)} file descriptors instead of one")
        return body, fds[0]


def start_guest(spec: EmbeddedSpec, guests_dir: Path) -> int:
    """Boot a guest that lives on without us; give its pid. Blocking.

    Raises:
        RequestRefused: a guest of this identity runs here already, or the directory cannot be used.
        GuestGone: the world's: it did not start; with the reason.
    """
    client = launch_guest(spec, guests_dir, is_incoming=False)
    try:
        return client.pid
    finally:
        client.close()


def launch_guest(spec: EmbeddedSpec, guests_dir: Path, *, is_incoming: bool) -> GuestClient:
    """Start a guest's process and connect to it.

    The process forks away from us before it does anything: it is no child of ours that we would have to wait for,
    and a signal to our process group or terminal does not reach it.

    Raises:
        RequestRefused: a guest of this identity runs here already, or the directory cannot be used.
        GuestGone: the world's: it did not start; with the reason.
    """
    prepare_guests_dir(guests_dir)
    paths = GuestPaths.of_guest(guests_dir.absolute(), spec.guest_id)
    if not clean_stale(paths):
        raise RequestRefused(f"a guest of this identity runs on this host already ({paths.socket})")
    complaint = _spawn(paths.socket, spec.to_bytes(), "--incoming" if is_incoming else "--spec")
    if complaint:
        raise GuestGone(f"guest {spec.name} did not start: {complaint}")
    client = GuestClient(paths.socket)
    if is_incoming:
        client.hold()
    return client


def _spawn(socket_path: Path, spec: bytes, how: str) -> str:
    """Start the process; give its complaint, or an empty string when it is ready."""
    spec_read, spec_write = os.pipe()
    ready_read, ready_write = os.pipe()
    try:
        os.write(spec_write, spec)  # less than a pipe holds
        os.close(spec_write)
        spec_write = -1
        code = run_to_end(
            [
                *(sys.executable, "-m", "agents.hypervisors.embedded", "--socket", str(socket_path)),
                *(how, f"/dev/fd/{spec_read}", "--detach", str(ready_write)),
            ],
            cwd=Path(__file__).parents[3],
            timeout_s=START_TIMEOUT_S,
            pass_fds=(spec_read, ready_write),
        )
        if code:
            raise GuestGone(f"the guest's process could not be started: it ended with code {code}")
        os.close(ready_write)
        ready_write = -1
        with open(ready_read, "rb", closefd=False) as ready:
            return ready.read(_MAX_SENTENCE_BYTES).decode(errors="replace")
    except (OSError, subprocess.SubprocessError) as exc:
        raise GuestGone(f"the guest's process could not be started: {exc}") from exc
    finally:
        for fd in (spec_read, spec_write, ready_read, ready_write):
            if fd >= 0:
                os.close(fd)


def _bytes(body: Body, key: str) -> bytes:
    value = body.get(key)
    if not isinstance(value, bytes):
        raise MessageInvalid(f"the guest's process gave no usable {key}")
    return value


def _text(body: Body, key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise MessageInvalid(f"the guest's process gave no usable {key}")
    return value


def _number(body: Body, key: str) -> int:
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MessageInvalid(f"the guest's process gave no usable {key}")
    return value
