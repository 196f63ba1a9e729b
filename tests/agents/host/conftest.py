"""Scratch folders for fleets, and the end of every guest that a test left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from agents.logs import TextFormatter
from tests.agents.host.fleet import scratch_folder


class AgentLog(logging.Handler):
    """The lines of all agents of this process, as an operator would read them."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(TextFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def count(self, words: str) -> int:
        """How many lines have these words."""
        return sum(words in line for line in self.lines)

    async def until(self, words: str) -> int:
        """Wait for a line with these words; give how many there are then."""
        with anyio.fail_after(5):
            while not self.count(words):
                await anyio.lowlevel.checkpoint()
        return self.count(words)


@pytest.fixture(autouse=True)
def agent_log() -> Iterator[AgentLog]:
    """What the agents say; shown with a test that fails."""
    handler, logger = AgentLog(), logging.getLogger("agents")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(level)
    logger.removeHandler(handler)
    print(*handler.lines, sep="\n")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A scratch folder with a short name, because sockets are in it."""
    with scratch_folder() as path:
        yield path
