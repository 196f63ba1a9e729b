"""`vmferry completion SHELL`: the script that a shell reads to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command(
    epilog="""\
\b
Examples:
  vmferry completion bash > ~/.local/share/bash-completion/completions/vmferry
  vmferry completion zsh > "${fpath[1]}/_vmferry"
  vmferry completion fish > ~/.config/fish/completions/vmferry.fish
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    shell_class = get_completion_class(shell)
    if shell_class is None:
        raise click.UsageError(f"no completion is known for {shell}")
    root = ctx.find_root()
    click.echo(shell_class(root.command, {}, "vmferry", "_VMFERRY_COMPLETE").source())
