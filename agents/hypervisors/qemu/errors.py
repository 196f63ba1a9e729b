"""What can go wrong with a QEMU guest.

QemuError
├── SpecInvalid      theirs: a description of a machine that cannot be, with every mistake
├── NotAllowed       theirs: a machine that this host's configuration does not allow, with every reason
├── NotAdoptable     theirs: a QEMU whose command line cannot be described by a spec; it names every argument
├── QmpFailed        QEMU's: it refuses a command, or answers nonsense
├── QemuGone         the world's: the process ended, does not answer, or did not start
└── InjectionFailed  the world's: the process cannot be traced here; it is as it was
"""

from __future__ import annotations

from agents.errors import AgentError

__all__ = [
    "InjectionFailed",
    "NotAdoptable",
    "NotAllowed",
    "QemuError",
    "QemuGone",
    "QmpFailed",
    "SpecInvalid",
]


class QemuError(AgentError):
    """Base of this package's errors. `str()` is one sentence with the cause and, where there is one, the remedy."""


class SpecInvalid(QemuError):
    """A spec with mistakes. `problems` has one sentence for each, all of them, named by key."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "the guest's spec cannot be used: " + "; ".join(self.problems)


class NotAllowed(QemuError):
    """This host's configuration does not let such a guest run here. `problems` has all the reasons."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(self.problems)


class NotAdoptable(QemuError):
    """A QEMU that somebody else started, with arguments that no spec has a place for: `problems`, a sentence each."""

    def __init__(self, *problems: str) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(self.problems)


class QmpFailed(QemuError):
    """QEMU said no. `kind` is QMP's error class, or `nonsense`."""

    def __init__(self, command: str, kind: str, text: str) -> None:
        super().__init__(command, kind, text)
        self.command = command
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return f"QEMU refuses {self.command}: {self.text}"


class QemuGone(QemuError):
    """The process ended, does not answer in time, or could not be started."""


class InjectionFailed(QemuError):
    """No system call could be injected; the process runs on as it was."""
