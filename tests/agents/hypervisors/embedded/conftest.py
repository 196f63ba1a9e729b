"""Guests of the tests: small, fast to start, and ended when the test ends."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agents.hypervisors.embedded.client import GuestClient
from agents.hypervisors.embedded.errors import EmbeddedError
from agents.hypervisors.embedded.spec import EmbeddedSpec

GUEST_ID = "3f0f4c6e-8f0b-4f57-9d0d-5a3c7c1b2a10"

SpecMaker = Callable[..., EmbeddedSpec]


@pytest.fixture
def make_spec() -> SpecMaker:
    """Give a maker of small specs: 2 MiB of RAM, a quarter of it filled, 256 KiB of it written."""

    def make(**changes: object) -> EmbeddedSpec:
        values: dict[str, object] = {
            "guest_id": GUEST_ID,
            "name": "small",
            "ram_bytes": 2 << 20,
            "working_set_bytes": 256 << 10,
            "fill_bytes": 512 << 10,
            "dirty_bytes_per_s": 8 << 20,
        }
        return EmbeddedSpec(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Give a directory with a short path, because sockets' paths are short; guests that are left in it are ended."""
    with tempfile.TemporaryDirectory(prefix="vmf") as name:
        yield Path(name)
        for socket in Path(name).rglob("*.sock"):
            with contextlib.suppress(EmbeddedError), contextlib.closing(GuestClient(socket)) as client:
                client.quit()
                client.await_end()
