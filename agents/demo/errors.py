"""What can go wrong in the demo.

DemoError
├── AgentDidNotStart     the world's: an agent's process ended or was silent; with the last line of its log
├── AgentEnded           ours: an agent's process ended while it was needed
├── NoQemu               the world's: no QEMU, no kernel, or a guest that does not boot; with the remedy
└── DemoFailed           the demo ended early for one of these or another known cause; says where the logs are
"""

from __future__ import annotations

from pathlib import Path

from agents.errors import AgentError

__all__ = ["AgentDidNotStart", "AgentEnded", "DemoError", "DemoFailed", "NoQemu"]


class DemoError(AgentError):
    """Base of this package's errors."""


class AgentDidNotStart(DemoError):
    """The agent of `host` does not serve. `last_words` is the end of its log, `was_in_use` that a port was taken."""

    def __init__(self, host: str, last_words: str, *, was_in_use: bool) -> None:
        super().__init__(host, last_words)
        self.host = host
        self.last_words = last_words
        self.was_in_use = was_in_use

    def __str__(self) -> str:
        return f"the agent of {self.host} did not start: {self.last_words or 'it said nothing'}"


class AgentEnded(DemoError):
    """The agent of `host` ended by itself with `code`."""

    def __init__(self, host: str, code: int, last_words: str) -> None:
        super().__init__(host, code, last_words)
        self.host = host
        self.code = code
        self.last_words = last_words

    def __str__(self) -> str:
        said = f"; its last words: {self.last_words}" if self.last_words else ""
        return f"the agent of {self.host} ended with code {self.code} in the middle of the demo{said}"


class NoQemu(DemoError):
    """A QEMU guest cannot be played with on this machine; the sentence says what is missing."""


class DemoFailed(DemoError):
    """The demo could not be played to its end. `causes` has a sentence each; `folder` is kept, with the logs."""

    def __init__(self, causes: tuple[str, ...], folder: Path, logs: tuple[Path, ...]) -> None:
        super().__init__(causes, folder, logs)
        self.causes = causes
        self.folder = folder
        self.logs = logs

    def __str__(self) -> str:
        lines = [
            "; ".join(self.causes),
            f"everything was ended, and {self.folder} is kept for you to look at",
        ]
        return "\n".join([*lines, *(f"log: {log}" for log in self.logs)])
