"""`vmferry checks`: what the preflight asks, why, and what to do: the catalogue that docs/preflight.md is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import click

from agents.cli.output import Exit, json_option, print_facts, print_json, print_table
from migrate.preflight import AREAS, Check

__all__ = ["checks", "markdown"]

_HEAD: Final = """\
# The checks of the preflight

<!-- Made by `vmferry checks --markdown > docs/preflight.md`; a test compares them. -->

`vmferry check GUEST --to HOST` runs all of them and changes nothing; `vmferry move` runs the same before it copies a
page, and again shortly before the guest is stopped. Each finding has one of four results:

| result | meaning | the move |
|---|---|---|
| `ok` | proved | goes on |
| `warning` | it will work, and something about it deserves a look | goes on |
| `unknown` | the fact could not be had, and the move does not depend on it | goes on |
| `refused` | it would not work, or it was not proved and the move depends on it | does not begin |

Ids are stable: `vmferry check web1 --to host-b --json | jq '.findings[] | select(.check == "storage")'`.
`vmferry check web1 --to any` asks all hosts; the exit code is 0 when the guest can move, 1 when it cannot.
"""


@click.command(
    epilog="""\
\b
Examples:
  vmferry checks
  vmferry checks cpu-features
  vmferry checks --json | jq -r '.[].check_id'
"""
)
@click.argument("check_id", required=False)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the page of the documentation.")
@json_option
def checks(check_id: str | None, as_markdown: bool, as_json: bool) -> int:
    """Explain the checks of the preflight, or the one that is named."""
    known = {check.check_id: (area, check) for area, check in _all()}
    if check_id is not None and check_id not in known:
        raise click.BadParameter(f"there is no check {check_id}; `vmferry checks` lists them")
    wanted = [check_id] if check_id is not None else list(known)
    if as_markdown:
        click.echo(markdown(), nl=False)
    elif as_json:
        print_json([known[one][1] for one in wanted])
    elif check_id is not None:
        check = known[check_id][1]
        print_facts({"check": check_id, "asked": check.asked, "why": check.why, "remedy": check.remedy})
    else:
        rows = [(one, area, check.asked) for one, (area, check) in known.items()]
        print_table(["CHECK", "AREA", "ASKED"], rows, empty="there are no checks")
    return Exit.OK


def _all() -> Iterator[tuple[str, Check]]:
    for area in AREAS:
        for check in area.CHECKS:
            yield area.__name__.rpartition(".")[2], check


def markdown() -> str:
    """Give docs/preflight.md."""
    lines = [_HEAD]
    for area in AREAS:
        name = area.__name__.rpartition(".")[2]
        lines.append(f"## {name.capitalize()}\n")
        lines.append(f"{(area.__doc__ or '').strip()}\n")
        for check in area.CHECKS:
            lines += [
                f"### `{check.check_id}`\n",
                f"{check.asked}",
                f"* Why: {check.why}.",
                f"* Remedy: {check.remedy}.\n",
            ]
    return "\n".join(lines)
