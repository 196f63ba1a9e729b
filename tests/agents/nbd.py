"""A real NBD server before an image."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.agents.host.fleet import free_port
from tests.waiting import until_blocking

__all__ = ["serving"]


@contextlib.contextmanager
def serving(image: Path, *options: str, export: str = "guest-1", clients: int = 0) -> Iterator[str]:
    """Serve a raw image to so many clients at once (0: any) while the block lasts; give the URL."""
    port = free_port()
    words = [
        "qemu-nbd",
        "-t",
        "-f",
        "raw",
        "-x",
        export,
        "-b",
        "127.0.0.1",
        "-p",
        str(port),
        "-e",
        str(clients),
    ]
    with subprocess.Popen([*words, "--cache=none", *options, str(image)]) as server:
        try:
            _wait_until_it_listens(port, server)
            yield f"nbd://127.0.0.1:{port}/{export}"
        finally:
            server.kill()


def _wait_until_it_listens(port: int, server: subprocess.Popen[bytes]) -> None:
    # By its listening socket: a client that connects may be the only one that it takes.
    wanted = f" 0100007F:{port:04X} 00000000:0000 0A "

    def listens() -> bool:
        if server.poll() is not None:
            raise AssertionError(f"qemu-nbd ended with {server.returncode}")
        return wanted in Path("/proc/net/tcp").read_text()

    until_blocking(listens, "a qemu-nbd that serves")
