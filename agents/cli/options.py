"""What the commands that talk to agents share: their options, quantities, and the way to a fleet.

Law: no command here, and no printing. Shell completion reads the configuration file and nothing else: no network,
no certificate, no complaint.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Final, TypeVar

import anyio
import click
from click.shell_completion import CompletionItem

from agents.client import Fleet
from agents.config import client_config_path, load_client_settings
from agents.errors import QuantityInvalid
from agents.units import parse_duration, parse_rate

__all__ = ["DURATION", "HOST", "RATE", "call", "config_option", "open_fleet"]

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")


# ParamType became generic in click 8.5; the lower bound of this project is older.
class Quantity(click.ParamType):  # type: ignore[type-arg]
    """A rate or duration as `agents.units` reads it."""

    def __init__(self, name: str, parse: Callable[[str], float]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Read the text; a value that is read already stays."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except QuantityInvalid as exc:
            self.fail(str(exc), param, ctx)


class HostName(click.ParamType):  # type: ignore[type-arg]
    """The name of a host; the configuration's hosts complete it."""

    name = "host"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Give the hosts of the configuration that `--config` names, or the default one."""
        try:
            path = Path(ctx.params.get("config") or client_config_path())
            hosts = tomllib.loads(path.read_text(encoding="utf-8")).get("hosts")
        except (OSError, ValueError):
            return []
        names = hosts if isinstance(hosts, dict) else {}
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


DURATION: Final = Quantity("duration", parse_duration)
RATE: Final = Quantity("rate", parse_rate)
HOST: Final = HostName()


def config_option(command: F) -> F:
    """Add `--config`, which arrives as `config`."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        # Read before the other options, so that completion of a host knows it.
        is_eager=True,
        help="Configuration file.  [default: $VMFERRY_CONFIG, or ~/.config/vmferry/client.toml]",
    )(command)


def open_fleet(config: Path | None) -> Fleet:
    """Make the client of all agents of a configuration.

    Raises:
        ConfigInvalid: with every mistake.
    """
    return Fleet(load_client_settings(config))


def call(function: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run a command's coroutine to its end."""
    return anyio.run(function)
