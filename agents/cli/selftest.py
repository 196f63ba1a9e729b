"""`vmferry selftest`: a line for each thing that was tried on this machine.

Law: the checks are `agents.demo.selftest`'s. Steps go to stderr, the result to stdout.
"""

from __future__ import annotations

import sys

import click

from agents.cli.options import call
from agents.cli.output import Exit, json_option, print_json, print_table

__all__ = ["selftest"]


@click.command(
    epilog="""\
\b
Examples:
  vmferry selftest
  vmferry selftest --json | jq '.[] | select(.state != "ok")'
"""
)
@json_option
def selftest(as_json: bool) -> int:
    """Try on this machine what moving stock QEMU guests needs.

    Tracking, injection, drain, holes, and a move between two agents, each with the real thing. Starts a scratch
    guest and ends it; takes some 30 s. Exits with 0 only if everything works.
    """
    from agents.cli.demo_text import open_steps
    from agents.demo.selftest import Check, State, run_selftest

    async def run() -> list[Check]:
        with open_steps(sys.stderr, as_json=as_json) as steps:
            return await run_selftest(steps)

    checks = call(run)
    if as_json:
        print_json(checks)
    else:
        print_table(["CHECK", "STATE", "SAW"], [(one.name, one.state, one.saw) for one in checks], empty="")
    return Exit.OK if all(one.state is State.OK for one in checks) else Exit.REFUSED
