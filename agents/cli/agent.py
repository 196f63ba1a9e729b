"""`vmferry agent`: the long-running host agent.

Law: reads the configuration and starts; everything else is in `agents.host`.
"""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["agent"]


@click.group()
def agent() -> None:
    """Run this host's agent.

    \b
    Examples:
      vmferry agent run --config /etc/vmferry/agent.toml
      vmferry agent check --config /etc/vmferry/agent.toml
    """


def _config_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path("/etc/vmferry/agent.toml"),
        show_default=True,
        help="The agent's configuration.",
    )(command)


@agent.command()
@_config_option
def run(config: Path) -> None:
    """Serve until SIGTERM, then drain and end.

    \b
    Examples:
      vmferry agent run --config /etc/vmferry/agent.toml
    """
    from agents.host.footprint import before_imports

    before_imports()
    from agents.config import LogFormat, load_settings
    from agents.host.agent import run_agent
    from agents.logs import configure_logs

    settings = load_settings(config)
    configure_logs(settings.agent.log_level, as_json=settings.agent.log_format is LogFormat.JSON)
    run_agent(settings)


@agent.command()
@_config_option
def check(config: Path) -> None:
    """Check a configuration and start nothing.

    \b
    Examples:
      vmferry agent check --config /etc/vmferry/agent.toml
    """
    from agents.config import load_settings

    settings = load_settings(config)
    click.echo(f"{config}: no mistakes; this is {settings.agent.name}")
