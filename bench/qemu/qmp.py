"""QMP for the bench, blocking and without ceremony: its threads have no event loop."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType

__all__ = ["Qmp", "stamp_s"]

Reply = dict[str, object]


class Qmp:
    """One connection to a monitor that answers. Close it."""

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._sock = socket.socket(socket.AF_UNIX)
            try:
                self._sock.connect(str(path))
                break
            except OSError:
                self._sock.close()
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.005)
        self._file = self._sock.makefile("rwb")
        self.events: list[Reply] = []
        self._file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, arguments: object = None) -> Reply:
        """Give the reply. Raises RuntimeError when QEMU says no."""
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        while True:
            message = self._read()
            if "error" in message:
                raise RuntimeError(f"{command}: {message['error']}")
            if "return" in message:
                value = message["return"]
                return value if isinstance(value, dict) else {"value": value}

    def wait_event(self, name: str, timeout_s: float) -> Reply:
        """Give the first event of that name. Raises TimeoutError."""
        self._sock.settimeout(timeout_s)
        try:
            while True:
                for at, event in enumerate(self.events):
                    if event["event"] == name:
                        return self.events.pop(at)
                self._read()
        finally:
            self._sock.settimeout(None)

    def close(self) -> None:
        self._file.close()
        self._sock.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> Reply:
        line = self._file.readline()
        if not line:
            raise RuntimeError("QEMU has closed its monitor")
        message: Reply = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message


def stamp_s(event: Reply) -> float:
    """When QEMU sent an event, by the host's clock."""
    stamp = event["timestamp"]
    assert isinstance(stamp, dict)
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
