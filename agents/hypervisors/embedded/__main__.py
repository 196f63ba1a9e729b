"""`python -m agents.hypervisors.embedded`: be one guest.

    --socket PATH     where to listen; PATH is GUESTS_DIR/GUEST_ID.sock
    --spec FILE       boot this guest: TOML if it is named so, else a spec's wire form
    --incoming FILE   be an empty machine of this spec, which waits for RAM and device state
    --detach FD       live on in a session of its own, with PATH's .log for output; tell FD how the start went:
                      nothing when it went well, else a sentence

Law: imports nothing heavy before the fork, so that whoever starts a guest waits for milliseconds only.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

_MAX_SENTENCE_BYTES = 4096


def main() -> int:
    """Be the guest until it ends."""
    parser = argparse.ArgumentParser(
        prog="python -m agents.hypervisors.embedded", description="Be one guest."
    )
    parser.add_argument(
        "--socket", type=Path, required=True, help="where to listen: GUESTS_DIR/GUEST_ID.sock"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--spec", type=Path, help="boot the guest that this file describes")
    what.add_argument("--incoming", type=Path, help="be an empty machine of this spec")
    parser.add_argument(
        "--detach", type=int, metavar="FD", help="live on in the background; tell FD how it went"
    )
    options = parser.parse_args()
    ready_fd: int | None = options.detach
    if ready_fd is not None:
        if os.fork():
            # Not sys.exit: the child is the guest now, and nothing was opened here that wants closing.
            os._exit(0)
        os.setsid()
    return _be_guest(options.socket, options.spec or options.incoming, options.incoming is not None, ready_fd)


def _be_guest(socket_path: Path, spec_file: Path, is_incoming: bool, ready_fd: int | None) -> int:
    # Before the imports, because numpy starts threads: SIGTERM must wait for the one thread that asks for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    from agents.errors import AgentError
    from agents.hypervisors.embedded.process import GuestProcess
    from agents.hypervisors.embedded.rundir import GuestPaths, hold_identity, leave, listen, redirect_output
    from agents.hypervisors.embedded.spec import EmbeddedSpec

    holds_identity = False
    paths = GuestPaths.of_socket(socket_path)
    try:
        if spec_file.suffix == ".toml":
            spec = EmbeddedSpec.from_toml(spec_file)
        else:
            spec = EmbeddedSpec.from_bytes(spec_file.read_bytes())
        os.umask(0o077)
        hold_identity(paths)
        holds_identity = True
        if ready_fd is not None:
            redirect_output(paths.log)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        guest = GuestProcess(spec, is_incoming=is_incoming)
        guest.serve(listen(paths))
    except (AgentError, OSError) as exc:
        # Before the complaint: whoever reads it may look for what is left, or start this guest again at once.
        if holds_identity:
            leave(paths)
        if ready_fd is None:
            print(f"error: {exc}", file=sys.stderr)
        else:
            os.write(ready_fd, str(exc).encode(errors="replace")[:_MAX_SENTENCE_BYTES])
        return 1
    if ready_fd is not None:
        os.close(ready_fd)
    guest.run()
    guest.close()
    leave(paths)
    return 0


if __name__ == "__main__":
    # Daemon threads may wait in the socket still: there is nothing that they could finish.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
