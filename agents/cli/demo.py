"""`vmferry demo`: the options, the terminal, and the end of the demo's story.

Law: the story is `agents.demo.run`'s. Steps and the live display go to stderr, the summary alone to stdout.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Final

import anyio
import click

from agents.cli.options import RATE, Quantity, call
from agents.cli.output import Exit, json_option, print_json
from agents.units import parse_size
from migrate.compression import Compression

if TYPE_CHECKING:
    from agents.demo.run import Demo, GuestKind, Outcome

__all__ = ["demo"]

DEFAULT_RAM: Final = "256MiB"
DEFAULT_DIRTY_RATE: Final = "20MiB/s"
# Each cut takes half a second; more of them prove nothing new.
MAX_CUTS: Final = 50

SIZE: Final = Quantity("size", parse_size)


@click.command(
    epilog="""\
\b
Examples:
  vmferry demo
  vmferry demo --ram 1GiB --dirty-rate 100MiB/s
  vmferry demo --link-rate 100Mbit/s --break-link 5
  vmferry demo --offline --json | jq .proof
  vmferry demo --guest qemu --ram 512MiB
"""
)
@click.option(
    "--ram", "ram_bytes", type=SIZE, default=DEFAULT_RAM, show_default=True, help="RAM of the guest."
)
@click.option(
    "--dirty-rate",
    "dirty_bytes_per_s",
    type=RATE,
    default=DEFAULT_DIRTY_RATE,
    show_default=True,
    help="How fast the guest writes its RAM.",
)
@click.option("--link-rate", "link_bytes_per_s", type=RATE, help="Cap of the link, for example 1Gbit/s.")
@click.option("--offline", "is_offline", is_flag=True, help="Stop the guest first, then copy it.")
@click.option(
    "--break-link",
    "link_cuts",
    metavar="N",
    type=click.IntRange(0, MAX_CUTS),
    default=0,
    help="Cut the link N times on the way, in the middle of a page.",
)
@click.option("--compression", type=click.Choice([one.value for one in Compression]), help="Of pages.")
@click.option(
    "--guest",
    type=click.Choice(["embedded", "qemu"]),
    default="embedded",
    show_default=True,
    help="Kind of guest: one of our own, or Linux in a stock QEMU.",
)
@click.option(
    "--event-loop",
    type=click.Choice(["asyncio", "trio"]),
    default="asyncio",
    show_default=True,
    help="What the agents run on.",
)
@click.option("--keep", is_flag=True, help="Keep the directory with configurations and logs.")
@json_option
def demo(
    ram_bytes: int,
    dirty_bytes_per_s: int,
    link_bytes_per_s: int | None,
    is_offline: bool,
    link_cuts: int,
    compression: str | None,
    guest: str,
    event_loop: str,
    keep: bool,
    as_json: bool,
) -> int:
    """Move a guest between two agents on this machine while it runs, and prove that nothing was lost.

    Needs no root, no QEMU and no network; with --guest qemu it boots Linux in the QEMU of this machine, with KVM where
    that works. Exits with 0 only if the whole proof holds.
    """
    from agents.config import EventLoop
    from agents.demo.run import Demo, GuestKind

    kind = GuestKind(guest)
    _check(ram_bytes, dirty_bytes_per_s, link_cuts, kind)
    order = Demo(
        ram_bytes=ram_bytes,
        kind=kind,
        dirty_bytes_per_s=dirty_bytes_per_s,
        link_bytes_per_s=link_bytes_per_s or None,
        is_offline=is_offline,
        link_cuts=link_cuts,
        compression=None if compression is None else Compression(compression),
        event_loop=EventLoop(event_loop),
        keep=keep,
    )

    async def play() -> Outcome | None:
        return await _play(order, as_json=as_json)

    outcome = call(play)
    if outcome is None:
        click.echo("interrupted: everything that was started has ended", err=True)
        return Exit.INTERRUPTED
    from agents.cli.demo_text import outcome_json, print_outcome

    if as_json:
        print_json(outcome_json(outcome, guest))
    else:
        print_outcome(outcome, sys.stdout)
    return Exit.OK if outcome.proof.holds and outcome.were_cuts_made else Exit.REFUSED


def _check(ram_bytes: int, dirty_bytes_per_s: int, link_cuts: int, kind: GuestKind) -> None:
    """Refuse what no guest can be made of, before anything is started."""
    from agents.demo.run import least_ram_bytes
    from agents.hypervisors.embedded.spec import MAX_DIRTY_BYTES_PER_S, MAX_RAM_BYTES, PAGE_BYTES

    smallest_bytes = least_ram_bytes(0, kind)
    if not smallest_bytes <= ram_bytes <= MAX_RAM_BYTES or ram_bytes % PAGE_BYTES:
        raise click.BadParameter(
            f"a guest has {smallest_bytes >> 20}MiB to {MAX_RAM_BYTES >> 30}GiB, in whole pages of "
            f"{PAGE_BYTES} bytes",
            param_hint="--ram",
        )
    least_bytes = least_ram_bytes(link_cuts, kind)
    if ram_bytes < least_bytes:
        raise click.BadParameter(
            f"a link is cut {link_cuts} times only while it carries at least {least_bytes >> 20}MiB of --ram",
            param_hint="--break-link",
        )
    if not PAGE_BYTES <= dirty_bytes_per_s <= MAX_DIRTY_BYTES_PER_S:
        raise click.BadParameter(
            f"a guest writes {PAGE_BYTES} bytes/s to {MAX_DIRTY_BYTES_PER_S >> 30}GiB/s",
            param_hint="--dirty-rate",
        )


async def _play(order: Demo, *, as_json: bool) -> Outcome | None:
    """Play the demo; None when it was interrupted. Further signals do not disturb the cleaning up."""
    from agents.cli.demo_text import open_steps
    from agents.demo.run import run_demo

    outcome: Outcome | None = None
    with (
        anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals,
        open_steps(sys.stderr, as_json=as_json) as steps,
    ):
        async with anyio.create_task_group() as tasks:

            async def hear() -> None:
                async for _ in signals:
                    tasks.cancel_scope.cancel()
                    steps.begins("interrupted: ending what was started")

            tasks.start_soon(hear)
            outcome = await run_demo(order, steps)
            tasks.cancel_scope.cancel()
    return outcome
