"""`vmferry`: the group of all commands, loaded when they are used.

Law: imports nothing but click and `output` at the top, so that `--help`, completion and a mistyped word answer at
once; `COMMANDS` has all that is needed to list a command without importing it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import click

from agents.cli.output import Exit, exit_code_of, print_error
from agents.version import VERSION

__all__ = ["COMMANDS", "LazyCommand", "LazyGroup", "cli", "main"]


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command is (`module:attribute`), and its line in the list of its `section`."""

    target: str
    summary: str
    section: str


COMMANDS: Final[Mapping[str, LazyCommand]] = MappingProxyType(
    {
        "move": LazyCommand(
            "agents.cli.moves:move",
            "Move GUEST, a name or an identity, to another host while it runs.",
            "Moves",
        ),
        "check": LazyCommand(
            "agents.cli.check:check",
            "Tell whether GUEST could move to a host: every finding, and what to do.",
            "Moves",
        ),
        "checks": LazyCommand(
            "agents.cli.checks:checks",
            "Explain the checks of the preflight, or the one that is named.",
            "Moves",
        ),
        "predictions": LazyCommand(
            "agents.cli.predictions:predictions",
            "Show what was predicted of moves beside what they took, and how good that was.",
            "Moves",
        ),
        "demo": LazyCommand(
            "agents.cli.demo:demo",
            "Move a guest between two agents on this machine while it runs, and prove that nothing was lost.",
            "Moves",
        ),
        "jobs": LazyCommand(
            "agents.cli.jobs:jobs", "List moves that run and those that ended lately.", "Jobs"
        ),
        "watch": LazyCommand(
            "agents.cli.jobs:watch", "Follow JOB to its end, and print how it ended.", "Jobs"
        ),
        "set": LazyCommand("agents.cli.jobs:set_limits", "Change the limits of JOB while it runs.", "Jobs"),
        "pause": LazyCommand("agents.cli.jobs:pause", "Hold the copying of JOB; the guest runs on.", "Jobs"),
        "resume": LazyCommand("agents.cli.jobs:resume", "Let a paused JOB go on copying.", "Jobs"),
        "cancel": LazyCommand(
            "agents.cli.jobs:cancel",
            "Cancel JOB, wait until it is rolled back, and say what runs where.",
            "Jobs",
        ),
        "resolve": LazyCommand(
            "agents.cli.jobs:resolve",
            "Show what is known of a JOB in doubt, and settle it with --act.",
            "Jobs",
        ),
        "hosts": LazyCommand(
            "agents.cli.hosts:hosts",
            "List all hosts: their guests, free memory, and migrations under way.",
            "Hosts",
        ),
        "guests": LazyCommand(
            "agents.cli.hosts:guests", "List all guests and the hosts they are on.", "Hosts"
        ),
        "cpu": LazyCommand(
            "agents.cli.cpu:cpu",
            "Show and compare the CPU models of hosts, and find the largest that all of them can run.",
            "Hosts",
        ),
        "guest": LazyCommand("agents.cli.guest:guest", "Start and stop guests of this host.", "Hosts"),
        "agent": LazyCommand("agents.cli.agent:agent", "Run this host's agent.", "Hosts"),
        "pki": LazyCommand(
            "agents.cli.pki:pki", "Make, show and revoke the certificates of agents and operators.", "Set-up"
        ),
        "selftest": LazyCommand(
            "agents.cli.selftest:selftest",
            "Try on this machine what moving stock QEMU guests needs.",
            "Set-up",
        ),
        "completion": LazyCommand(
            "agents.cli.completion:completion", "Print the completion script of a shell.", "Set-up"
        ),
    }
)

EPILOG: Final = """\
\b
Exit codes:
  0    done
  1    the move or the check failed, or was refused: nothing is lost, the message says what runs where
  2    wrong usage or configuration: nothing was started
  3    an agent cannot be reached, or does not prove who it is
  4    in doubt: see `vmferry resolve --help`
  130  interrupted with Ctrl-C
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def __init__(self, *args: object, commands_by_name: Mapping[str, LazyCommand], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._lazy = commands_by_name

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give all names, in the table's order: the way of a person who begins."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        lazy = self._lazy.get(cmd_name)
        if lazy is None:
            return None
        module, _, attribute = lazy.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{lazy.target} is not a command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; an unknown one is answered with the nearest."""
        if args and args[0] not in self._lazy and not args[0].startswith("-"):
            nearest = difflib.get_close_matches(args[0], self._lazy, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "see `vmferry --help`"
            ctx.fail(f"no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List all commands by section, without importing one."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, lazy in self._lazy.items():
            sections.setdefault(lazy.section, []).append((name, lazy.summary))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Complete names from the table alone: a shell waits for this at every key."""
        items = [
            click.shell_completion.CompletionItem(name, help=lazy.summary)
            for name, lazy in self._lazy.items()
            if name.startswith(incomplete)
        ]
        return items + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    commands_by_name=COMMANDS,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, prog_name="vmferry", message="%(prog)s %(version)s")
def cli() -> None:
    """Move running virtual machines between hosts: sealed, compressed, proved to the byte, never doubled.

    `vmferry COMMAND --help` has examples for each command.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and give its exit code.

    A command returns its code, or None for 0. Errors that are known are printed and become their code; any
    other exception is a bug and leaves with its traceback.
    """
    try:
        outcome = cli.main(
            args=None if argv is None else list(argv), prog_name="vmferry", standalone_mode=False
        )
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as exc:
        code = exit_code_of(exc)
        if code is None:
            raise
        print_error(exc)
        return int(code)
    return outcome if isinstance(outcome, int) else int(Exit.OK)
